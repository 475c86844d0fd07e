"""Checkpoint weights: which tensors are the weights; the others are named and counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.errors import FormatError, SettingError
from tersor.io.checkpoint import Checkpoint
from tersor.io.pack import pack
from tersor.io.patch.diff import diff
from tersor.io.unpack import unpack


def net(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"conv.weight": torch.randn(2, 3, generator=g), "conv.bias": torch.randn(2, generator=g)}


A, B, NUMBER = net(0), net(1), torch.tensor(3.0)
STATE = {"state": {0: {"exp_avg": torch.ones(2), "step": NUMBER}}, "param_groups": [{"lr": 0.1}]}
LATENT = torch.ones(5)
NAMES = ["conv.weight", "conv.bias"]


def under(*keys: str) -> list[str]:
    return [f"{key}.{name}" for key in keys for name in NAMES]


# (what is saved, names that are read, key, what is left out)
CASES: dict[str, tuple[Any, list[str], str, dict[str, int]]] = {
    "bare": (A, NAMES, "", {}),
    "bare, with numbers": ({**A, "epoch": 3, "note": "x"}, NAMES, "", {"epoch": 0, "note": 0}),
    "bare, with tensors of one number": ({**A, "scale": NUMBER}, [*NAMES, "scale"], "", {}),
    "numbers as names": ({0: LATENT, 1: LATENT + 1}, ["0", "1"], "", {}),
    "training": (
        {"state_dict": A, "optimizer": STATE, "epoch": 3}, NAMES, "state_dict", {"optimizer": 2, "epoch": 0}),
    "training, with a score": (
        {"model": A, "best_acc1": NUMBER, "epoch": 3}, NAMES, "model", {"best_acc1": 1, "epoch": 0}),
    "training, with random states": (
        {"model": A, "rng_state": torch.ones(4).byte(), "cuda_rng_state": [torch.ones(4).byte()] * 2},
        NAMES, "model", {"rng_state": 1, "cuda_rng_state": 2}),
    "lightning": (
        {"state_dict": A, "optimizer_states": [STATE, STATE], "lr_schedulers": [{"last": NUMBER}], "epoch": 1,
         "callbacks": {"best": {"score": NUMBER}}, "loops": {"fit": {"at": 1}}},
        NAMES, "state_dict",
        {"optimizer_states": 4, "lr_schedulers": 1, "epoch": 0, "callbacks": 1, "loops": 0}),
    "wrapped twice": (
        {"checkpoint": {"model": A, "epoch": 1}, "version": 2}, NAMES, "checkpoint.model",
        {"version": 0, "checkpoint.epoch": 0}),
    "under a key of its own": ({"netG": A, "step": 3}, NAMES, "netG", {"step": 0}),
    "parallel": ({"module": A}, NAMES, "module", {}),
    "parallel, bare": (
        {f"module.{name}": value for name, value in A.items()}, NAMES, "", {}),
    "networks": ({"g": A, "d": B, "step": 3}, under("g", "d"), "", {"step": 0}),
    "networks, optimizers and a loose tensor": (
        {"g": A, "g_ema": B, "g_optim": STATE, "latent_avg": LATENT},
        [*under("g", "g_ema"), "latent_avg"], "", {"g_optim": 2}),
    "a network and a loose tensor": (
        {"g_ema": A, "latent_avg": LATENT}, [*under("g_ema"), "latent_avg"], "", {}),
    "networks and a number": ({"g": A, "d": B, "alpha": NUMBER}, [*under("g", "d"), "alpha"], "", {}),
    "a known wrapper and a copy": (
        {"state_dict": A, "state_dict_ema": B, "optimizer": STATE},
        under("state_dict", "state_dict_ema"), "", {"optimizer": 2}),
    "a known wrapper and a loose tensor": (
        {"model": A, "classes": LATENT}, [*under("model"), "classes"], "", {}),
    "an average inside": ({"model": A, "ema": {"decay": 0.9, "shadow": B}},
        [*under("model"), *under("ema.shadow")], "", {"ema.decay": 0}),
    "deeper": ({"params": {"a": {"w": LATENT}, "b": {"w": LATENT + 1}}}, ["a.w", "b.w"], "params", {}),
    "tensors beside dicts": ({**A, "extra": {"amax": LATENT}}, [*NAMES, "extra.amax"], "", {}),
    "lists": ({"a": LATENT, "heads": [LATENT + 1, (LATENT + 2,)]}, ["a", "heads.0", "heads.1.0"], "", {}),
    "a list": ([A, B], [*under("0"), *under("1")], "", {}),
    "an optimizer by another key": ({"model": A, "opt": STATE}, NAMES, "model", {"opt": 2}),
    "optimizers in a list and in a dict": (
        {"model": A, "opts": [STATE, STATE], "adam": {"g": STATE, "note": "x"}}, NAMES, "model",
        {"opts": 4, "adam": 2}),
    "an optimizer beside loose tensors": ({**A, "adam": STATE}, NAMES, "", {"adam": 2}),
    "an optimizer inside a network's dict": (
        {"g": {"net": A, "adam": STATE}, "d": B}, [*under("g.net"), *under("d")], "", {"g.adam": 2}),
    "only an optimizer": (STATE, ["exp_avg", "step"], "state.0", {"param_groups": 0}),
}  # fmt: skip


def at(value: Any, name: str) -> torch.Tensor:
    """The tensor with a dotted name."""
    if isinstance(value, torch.Tensor) and not name:
        return value
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if name == str(key) or name.startswith(f"{key}."):
            return at(item, name[len(str(key)) + 1 :])
    raise KeyError(name)


@pytest.mark.parametrize("case", CASES)
def test_what_is_chosen(case: str, tmp_path: Path) -> None:
    saved, names, key, ignored = CASES[case]
    torch.save(saved, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt") as source:
        assert list(source.slots) == names
        assert not source.aliases
        assert source.key == key
        assert source.ignored == ignored
        for name in names:
            prefix = f"{key}." if key else source.stripped
            assert torch.equal(source.read(name), at(saved, f"{prefix}{name}"))


def tensors_in(value: Any) -> int:
    if isinstance(value, dict | list | tuple):
        return sum(map(tensors_in, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_read_or_counted(case: str, tmp_path: Path) -> None:
    saved, *_ = CASES[case]
    torch.save(saved, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt") as source:
        counted = sum(count or 0 for count in source.ignored.values())
        assert len(source.slots) + len(source.aliases) + counted == tensors_in(saved)


GAN = {"g": A, "g_ema": {**B, "inner": A}, "g_optim": STATE, "latent_avg": LATENT, "epoch": 1}


@pytest.mark.parametrize(
    ("key", "names", "ignored"),
    [
        ("g", NAMES, {"g_ema": 4, "g_optim": 2, "latent_avg": 1, "epoch": 0}),
        ("g_ema.inner", NAMES, {
            "g": 2, "g_optim": 2, "latent_avg": 1, "epoch": 0, "g_ema.conv.weight": 1, "g_ema.conv.bias": 1}),
        ("g_optim", ["state.0.exp_avg", "state.0.step"], {
            "g": 2, "g_ema": 4, "latent_avg": 1, "epoch": 0, "g_optim.param_groups": 0}),
    ],
)  # fmt: skip
def test_a_key_chooses(key: str, names: list[str], ignored: dict[str, int], tmp_path: Path) -> None:
    torch.save(GAN, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt", key) as source:
        assert [*source.slots] == names
        assert (source.key, source.ignored) == (key, ignored)


def test_a_key_chooses_among_names_with_dots(tmp_path: Path) -> None:
    """The prefix of DataParallel, or one of several networks in a file."""
    torch.save({f"module.{name}": value for name, value in A.items()} | {"x.y": LATENT}, tmp_path / "w.pt")
    save_file(
        {f"module.{name}": value for name, value in A.items()} | {"x.y": LATENT}, tmp_path / "w.safetensors"
    )
    for name in ("w.pt", "w.safetensors"):
        with Checkpoint(tmp_path / name, "module") as source:
            assert set(source.slots) == set(NAMES)
            assert source.ignored == {"x.y": 1}
            assert all(torch.equal(source.read(name), A[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("g_emma", "key='g_emma': no tensor is under it; did you mean 'g_ema'"),
        ("latent_avg", "key='latent_avg': it is one tensor; .*Allowed: g, g_ema$"),
        ("optimizer", "no tensor is under it; Allowed: g, g_ema$"),
        ("", "key='': no tensor is under it"),
    ],
)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_an_unknown_key(key: str, said: str, kind: str, tmp_path: Path) -> None:
    torch.save(GAN, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt", "g") as source:
        assert source.slots
    flat = {"g.a": LATENT, "g_ema.a": LATENT + 1, "g_optim.a": LATENT + 2, "latent_avg": LATENT + 3}
    save_file(flat, tmp_path / "w.safetensors")
    with pytest.raises(SettingError, match=said):
        Checkpoint(tmp_path / f"w.{kind}", key)


def test_no_optimizer_is_suggested_for_a_misspelt_key(tmp_path: Path) -> None:
    """Its exact key still selects it."""
    torch.save({"g_ema": A, "gem": STATE}, tmp_path / "w.pt")
    with pytest.raises(SettingError, match="did you mean 'g_ema'. Allowed: g_ema$"):
        Checkpoint(tmp_path / "w.pt", "gema")
    with Checkpoint(tmp_path / "w.pt", "gem") as source:
        assert list(source.slots) == ["state.0.exp_avg", "state.0.step"]


def test_optimizer_state_of_torch_is_left_out(tmp_path: Path) -> None:
    """{"model": ..., "opt": ...}: once its moments were packed as weights and names had a prefix."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for key in ("opt", "adam"):
        torch.save({"model": model.state_dict(), key: optimizer.state_dict()}, tmp_path / "w.pt")
        with Checkpoint(tmp_path / "w.pt") as source:
            assert (list(source.slots), source.key) == (["weight", "bias"], "model")
            assert source.ignored == {key: 6}


def circle() -> Any:
    found: dict[str, Any] = {"w": torch.ones(1)}
    found["model"] = found
    return found


def many() -> Any:
    """Few bytes that expand to 2^31 items."""
    found: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(31):
        found = {"a": found, "b": found}
    return found


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"optimizer": STATE, "epoch": 1}, "training state, under 'optimizer'.*--key optimizer"),
        ({"opt": STATE}, "training state, under 'opt'.*--key opt"),
        ({"a": {"b": LATENT}, "a.b": LATENT}, "two of its tensors would be called a.b"),
        ({0: LATENT, "0": LATENT}, "two of its keys are written '0'"),
        (circle(), "more than 32 deep"),
        (many(), "more than [\\d,]+"),
        ({}, "it holds a dict, but a state dict is expected"),
        ([], "it holds a list, but a state dict is expected"),
        (3, "it holds a int, but a state dict is expected"),
        ({"model": nn.Linear(2, 2)}, "it holds Python objects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_not_a_state_dict(saved: Any, said: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(FormatError, match=said):
        Checkpoint(tmp_path / "w.pt")


def test_all_networks_are_packed(tmp_path: Path) -> None:
    """{"g_ema": {...}, "latent_avg": t}: once only latent_avg was packed and the network was dropped."""
    torch.save({"g_ema": A, "latent_avg": LATENT}, tmp_path / "w.pt")
    recipe = tersor.Recipe((tersor.Entropy(),))
    done = pack(tmp_path / "w.pt", tmp_path / "w.tersor", recipe)
    assert (done.tensors, done.key, done.ignored) == (3, "", {})
    unpack(tmp_path / "w.tersor", tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    expected = {f"g_ema.{name}": value for name, value in A.items()} | {"latent_avg": LATENT}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    done = pack(tmp_path / "w.pt", tmp_path / "g.tersor", recipe, key="g_ema")
    assert (done.tensors, done.key, done.ignored) == (2, "g_ema", {"latent_avg": 1})
    assert set(tersor.load(tmp_path / "g.tersor").state_dict()) == set(NAMES)


def test_diff_names_what_it_leaves_out(tmp_path: Path) -> None:
    torch.save({"state_dict": A}, tmp_path / "old.pt")
    torch.save({"state_dict": B, "optimizer": STATE}, tmp_path / "new.pt")
    assert diff(tmp_path / "old.pt", tmp_path / "new.pt", tmp_path / "p").ignored == {"optimizer": 2}


@pytest.mark.parametrize("index", [True, False])
def test_shards_of_a_training(index: bool, tmp_path: Path) -> None:
    torch.save({"module": {"conv.weight": A["conv.weight"]}, "optim": [LATENT]}, tmp_path / "a.bin")
    torch.save({"module": {"conv.bias": A["conv.bias"]}, "optim": [LATENT] * 2}, tmp_path / "b.bin")
    if index:
        text = '{"weight_map": {"conv.weight": "a.bin", "conv.bias": "b.bin"}}'
        (tmp_path / "w.bin.index.json").write_text(text)
    with Checkpoint(tmp_path) as source:
        assert (list(source.slots), source.key, source.ignored) == (NAMES, "module", {"optim": 3})


def test_a_key_chooses_among_shards(tmp_path: Path) -> None:
    save_file({"a.w": LATENT, "b.w": LATENT + 1}, tmp_path / "1.safetensors")
    save_file({"b.v": LATENT + 2}, tmp_path / "2.safetensors")
    places = {"a.w": "1.safetensors", "b.w": "1.safetensors", "b.v": "2.safetensors"}
    (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": places}))
    with Checkpoint(tmp_path, "b") as source:
        assert (set(source.slots), source.ignored) == ({"w", "v"}, {"a.w": 1})
    with Checkpoint(tmp_path, "a") as source:
        assert (list(source.slots), source.ignored) == (["w"], {"b.w": 1, "2.safetensors": None})
    with pytest.raises(SettingError, match="key='c': no tensor is under it"):
        Checkpoint(tmp_path, "c")
