"""Pack and unpack: round trips, agreement with a run on the whole model, refusals before writing."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import MODELS, tiny
from torch import Tensor

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.core.step import Needs
from tersor.dtypes import CODES
from tersor.errors import FormatError, RefusedError, SettingError, SiteError
from tersor.forms import Coded, Dense
from tersor.io.container import load
from tersor.io.pack import pack
from tersor.io.unpack import unpack
from tersor.io.verify import verify
from tersor.model.sites import Site
from tersor.record.observer import Observer
from tersor.steps import STEPS, Cluster, Entropy, Factorize, Finetune, Measure, Prune, Quantize
from tersor.steps.recipe_text import lock

LOSSLESS = Recipe((Entropy(),))


def weights(kind: str, path: Path) -> dict[str, Tensor]:
    """A tiny model's weights as safetensors, with the first name of tied tensors only, as is usual."""
    found: dict[str, Tensor] = {}
    for name, value in tiny(kind).model.state_dict().items():
        if not any(
            value.data_ptr() == other.data_ptr() and value.shape == other.shape for other in found.values()
        ):
            found[name] = value
    save_file(found, path)
    return found


def bits(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_same(path: Path, expected: dict[str, Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert bits(found[name]) == bits(value)


@pytest.mark.parametrize("kind", MODELS)
def test_lossless(kind: str, tmp_path: Path) -> None:
    given = weights(kind, tmp_path / "w.safetensors")
    packed = pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS)
    assert packed.nbytes == (tmp_path / "m.tersor").stat().st_size
    assert packed.before == sum(value.nbytes for value in given.values())
    assert (packed.tensors, packed.ignored) == (len(given), {})
    assert (
        unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors")
        == (tmp_path / "u.safetensors").stat().st_size
    )
    check_same(tmp_path / "u.safetensors", given)
    with safe_open(tmp_path / "u.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(check.sound for check in verify(tmp_path / "m.tersor"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.tersor", "u.safetensors", "w.safetensors"]


def test_every_dtype(tmp_path: Path) -> None:
    given = {str(dtype): torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]]).repeat(8, 8).to(dtype) for dtype in CODES}
    save_file(given, tmp_path / "w.safetensors")
    packed = pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS)
    unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors")
    check_same(tmp_path / "u.safetensors", given)
    left = {entry.site for entry in packed.ledger.notes("skipped") if "stored as it is" in entry.text}
    rare = (
        "uint16",
        "uint32",
        "uint64",
        "float8_e4m3fn",
        "float8_e5m2",
        "complex64",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
    assert left == {f"torch.{word}" for word in rare}


def as_compressed(given: dict[str, Tensor]) -> State:
    """The same weights as one state, for core/run.py."""
    from tersor.core.state import digest_of
    from tersor.io.header import Slot
    from tersor.io.name_hints import describe
    from tersor.record.ledger import Ledger

    sites = {name: describe(name, Slot(v.dtype, tuple(v.shape), 0, 0)) for name, v in given.items()}
    forms = {name: Dense(value) for name, value in given.items()}
    return State(sites, forms, {}, Ledger(digest_of({name: form.digest for name, form in forms.items()})))


@pytest.mark.parametrize(
    "steps",
    [
        (Prune(keep=0.5, per="tensor"), Cluster(entries=4, init="kmeans++"), Entropy()),
        (Quantize(bits=4, per="group", group=4, where="*stem*,*head*"), Entropy(where="*.weight")),
        (Factorize(rank=1, where="!*stem*"), Quantize(bits=8)),
        (Prune(pattern="1:2", where="block.weight"), Quantize(scheme="ternary")),
    ],
    ids=lambda steps: "-".join(step.name for step in steps),
)
def test_same_as_a_run_on_everything(steps: tuple[object, ...], tmp_path: Path) -> None:
    """One tensor at a time or all together: the same forms and the same ledger, except for seconds."""
    given = weights("conv", tmp_path / "w.safetensors")
    recipe = Recipe(steps, seed=5)
    whole = run(as_compressed({name: given[name] for name in load_file(tmp_path / "w.safetensors")}), recipe)
    packed = pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", recipe)
    loaded = load(tmp_path / "m.tersor")
    order = {name: whole.forms[name] for name in loaded.forms}
    assert {n: f.digest for n, f in loaded.forms.items()} == {n: f.digest for n, f in order.items()}
    assert loaded.ledger.base == packed.ledger.base == whole.ledger.base
    assert loaded.ledger.recipe == whole.ledger.recipe

    def decisions(entries: list) -> list:  # type: ignore[type-arg]
        return sorted((e.step, e.name, e.site, e.how, e.before, e.after, e.kind, e.text) for e in entries)

    assert decisions(loaded.ledger.entries) == decisions(whole.ledger.entries)


@pytest.mark.parametrize(
    "step", [step for step in STEPS.values() if step().needs is Needs.NOTHING], ids=lambda s: s.name
)
def test_steps_without_needs_work_alone(step: type, tmp_path: Path) -> None:
    weights("mixed", tmp_path / "w.safetensors")
    made = step()
    if made.needs is not Needs.NOTHING:
        with pytest.raises(RefusedError, match=f"pack: {made.name}, as it is set, needs the whole model"):
            pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", Recipe((made,)))
        return
    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", Recipe((made,)))
    assert all(check.sound for check in verify(tmp_path / "m.tersor"))


# --- refused before anything is written ---


@pytest.mark.parametrize(
    ("recipe", "error", "said"),
    [
        (
            Recipe((Prune(keep=0.5),)),
            RefusedError,
            "pack: prune, as it is set, needs the whole model.*Give it per=tensor here",
        ),
        (Recipe((Entropy(), Finetune(epochs=1))), RefusedError, "pack: finetune.*Leave it out here"),
        (Recipe((Factorize(),)), RefusedError, "pack: factorize.*Give it per=tensor here"),
        (Recipe((Measure(),)), RefusedError, "pack: measure"),
        (Recipe((Quantize(where="fc*"),)), SiteError, "quantize: where='fc.' matches no weight"),
        (Recipe((Entropy(where="*.wait"),)), SiteError, r"entropy: where='\*.wait' matches no weight"),
        (Recipe((Prune(where="!*", per="tensor"),)), SiteError, "leaves no weight"),
    ],
)
def test_refused_at_once(recipe: Recipe, error: type[Exception], said: str, tmp_path: Path) -> None:
    weights("conv", tmp_path / "w.safetensors")
    out = tmp_path / "out" / "m.tersor"
    with pytest.raises(error, match=said):
        pack(tmp_path / "w.safetensors", out, recipe)
    assert not out.parent.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_by_name(value: float, tmp_path: Path) -> None:
    given = {"a": torch.ones(3), "b.weight": torch.tensor([[1.0, value], [value, 2.0]])}
    save_file(given, tmp_path / "w.safetensors")
    out = tmp_path / "m.tersor"
    out.write_bytes(b"earlier")
    with pytest.raises(RefusedError, match="b.weight: 2 of 4 values are NaN or infinite"):
        pack(tmp_path / "w.safetensors", out, LOSSLESS)
    assert out.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.tersor", "w.safetensors"]


def test_masks_of_infinities_are_kept(tmp_path: Path) -> None:
    given = {
        "mask": torch.full((9, 9), -torch.inf).triu(1), "low": torch.tensor(torch.inf),
        "w": torch.randn(9, 9),
    }  # fmt: skip
    save_file(given, tmp_path / "w.safetensors")
    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", Recipe((Quantize(), Entropy())))
    assert {name: site.kind for name, site in load(tmp_path / "m.tersor").sites.items()} == {
        "mask": "buffer", "low": "buffer", "w": "linear"
    }  # fmt: skip
    assert all(check.sound for check in verify(tmp_path / "m.tersor"))
    unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors")
    found = load_file(tmp_path / "u.safetensors")
    assert all(torch.equal(found[name], given[name]) for name in ("mask", "low"))


def test_broken_8_bit_floats_are_refused_too(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2)}, tmp_path / "w.safetensors")
    with pytest.raises(RefusedError, match="w: 1 of 2 values are NaN"):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS)


def test_lock(tmp_path: Path) -> None:
    given = weights("conv", tmp_path / "w.safetensors")
    recipe = Recipe((Quantize(bits=4),))
    locked = lock(run(as_compressed(given), recipe))
    good = Recipe(recipe.steps, 0, locked["base"], tuple(locked["result"].items()))
    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", good)
    (tmp_path / "m.tersor").unlink()
    other = Recipe((Quantize(bits=5),), 0, locked["base"], good.result)
    with pytest.raises(RefusedError, match="came out as .* the lock says"):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", other)
    with pytest.raises(RefusedError, match="the lock is for base 0123"):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", Recipe(recipe.steps, 0, "0123456789abcdef"))
    assert not (tmp_path / "m.tersor").exists()


# --- ties ---


def test_ties_of_a_state_dict_are_kept(tmp_path: Path) -> None:
    tied = torch.randn(9, 7)
    given = {"embed.weight": tied, "head.weight": tied, "other": torch.randn(4)}
    torch.save(given, tmp_path / "w.pt")
    packed = pack(tmp_path / "w.pt", tmp_path / "m.tersor", Recipe((Quantize(bits=8), Entropy())))
    assert packed.aliases == {"head.weight": "embed.weight"}
    assert load(tmp_path / "m.tersor").aliases == packed.aliases
    unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors")
    found = load_file(tmp_path / "u.safetensors")
    assert found.keys() == given.keys()
    assert torch.equal(found["head.weight"], found["embed.weight"])
    assert torch.equal(found["other"], given["other"])


def test_large_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    same = torch.randn(300, 100)
    given = {"a": same, "b": same.clone(), "c": same + 1, "d": torch.zeros(10), "e": torch.zeros(10)}
    save_file(given, tmp_path / "w.safetensors")
    packed = pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS)
    assert packed.aliases == {"b": "a"}  # small tensors may be equal by chance
    unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors")
    check_same(tmp_path / "u.safetensors", given)
    # Equal before but not after: not tied.
    packed = pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", Recipe((Quantize(bits=4, where="a"),)))
    assert packed.aliases == {}
    # Equal after but not before: not tied either, since their ledger entries differ.
    given = {name: torch.full((300, 100), value) for name, value in (("a", 0.1), ("b", 0.2))}
    save_file(given, tmp_path / "w.safetensors")
    recipe = Recipe((Prune(threshold=9.0), Cluster(entries=1), Entropy()))
    assert pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", recipe).aliases == {}


# --- the rest ---


def test_progress_is_reported(tmp_path: Path) -> None:
    given, seen = weights("conv", tmp_path / "w.safetensors"), []

    class Told(Observer):
        def progress(self, done: int, total: int, text: str = "") -> None:
            seen.append((done, total, text))

    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS, observer=Told())
    assert [(done, total) for done, total, _ in seen] == [(n, len(given)) for n in range(1, len(given) + 1)]
    assert {text for *_, text in seen} == set(given)
    seen.clear()
    unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors", observer=Told())
    assert len(seen) == len(given)


def test_sites_are_described_by_name_and_shape(tmp_path: Path) -> None:
    given = {
        "a.weight": torch.ones(4, 3), "b.weight": torch.ones(4, 3, 2, 2), "b.bias": torch.ones(4),
        "n.running_mean": torch.ones(4), "ids": torch.ones(2, 2, dtype=torch.int64),
        "six": torch.ones([1] * 6),
    }  # fmt: skip
    save_file(given, tmp_path / "w.safetensors")
    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS)
    sites = load(tmp_path / "m.tersor").sites
    kinds = {name: site.kind for name, site in sites.items()}
    assert kinds == {
        "a.weight": "linear", "b.weight": "conv", "b.bias": "other",
        "n.running_mean": "buffer", "ids": "other", "six": "other",
    }  # fmt: skip
    assert sites["b.bias"] == Site("b.bias", (4,), "float32", "other", layer="b")


def test_entropy_codes_supported_dtypes(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(50, 50)}, tmp_path / "w.safetensors")
    packed = pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS)
    assert isinstance(load(tmp_path / "m.tersor").forms["w"], Coded)
    assert packed.nbytes < 1000


def test_unpack_refuses_other_kinds_of_files(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS)
    with pytest.raises(SettingError, match="name it w.safetensors, not w.pt"):
        unpack(tmp_path / "m.tersor", tmp_path / "w.pt")
    with pytest.raises(FormatError, match="Pack it with"):
        unpack(tmp_path / "w.safetensors", tmp_path / "v.safetensors")


def test_unpack_writes_nothing_of_a_damaged_file(tmp_path: Path) -> None:
    save_file({"a": torch.randn(40, 40), "b": torch.randn(40, 40)}, tmp_path / "w.safetensors")
    path, out = tmp_path / "m.tersor", tmp_path / "u.safetensors"
    pack(tmp_path / "w.safetensors", path, Recipe((Quantize(),)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    out.write_bytes(b"earlier")
    with pytest.raises(FormatError, match="damaged"):
        unpack(path, out)
    assert out.read_bytes() == b"earlier"
