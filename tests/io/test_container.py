"""Save and load: states round-trip bit for bit, and the reference reader agrees."""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forge import header_of, reference, take_apart
from hypothesis import given
from hypothesis import strategies as st
from random_forms import forms
from tiny import MODELS, tiny

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import FormatError, RefusedError, SiteError, StorageError
from tersor.forms import Coded, Dense, Form, LowRank, Masked
from tersor.io.container import TersorFile, load, read_tensor
from tersor.io.container_writer import save
from tersor.io.document import KEYS
from tersor.model.sites import Site
from tersor.record.ledger import Entry, Ledger
from tersor.steps import Cluster, Entropy, Prune, Quantize

# Without a colon no name of a site is the name of another one's leaf.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters=":"), max_size=12).filter(
    lambda n: n != "tersor"
)


def result(forms: Mapping[str, Form], ledger: Ledger | None = None, **aliases: str) -> State:
    sites = {
        name: Site(
            name, tuple(form.shape), str(form.decode().dtype)[6:], "linear", layer=name.rpartition(".")[0]
        )
        for name, form in forms.items()
    }
    return State(sites, forms, aliases, ledger or Ledger("", {}))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a) == as_bytes(b)


def as_bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def has_product(form: Form) -> bool:
    return any(isinstance(node, LowRank) for _, node in form.walk())


@given(st.dictionaries(NAMES, forms(), max_size=3))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, given_forms: dict[str, Form]) -> None:
    path = tmp_path_factory.mktemp("round") / "model.tersor"
    before = result(given_forms)
    assert save(before, path) == path.stat().st_size
    after = load(path)
    assert {name: form.digest for name, form in after.forms.items()} == {
        name: form.digest for name, form in before.forms.items()
    }
    assert list(after.sites.values()) == list(before.sites.values())
    tensors = before.state_dict()
    for name, value in after.state_dict().items():
        assert same_bits(value, tensors[name])


@pytest.mark.wide
@given(forms(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_second_reader_agrees(
    tmp_path_factory: pytest.TempPathFactory, form: Form, dtype: torch.dtype
) -> None:
    """Bit for bit, except for products, whose sums have no fixed order."""
    path = tmp_path_factory.mktemp("second") / "model.tersor"
    compressed = State(
        {"w": Site("w", tuple(form.shape), str(dtype)[6:], "linear")}, {"w": form}, {}, Ledger("", {})
    )
    save(compressed, path)
    value, other = compressed.state_dict()["w"], reference.read(path)["w"]
    assert other.dtype == str(dtype)[6:]
    if not has_product(form):
        assert other.values.tobytes() == as_bytes(value)
        return
    wide, size = value.double().numpy(), reference.widened(other).astype(float)
    assert wide.shape == size.shape
    room = 20 * torch.finfo(dtype).eps * (1 + np.abs(wide))  # of numbers of size 1, a few of which are added
    assert (np.abs(wide - size) <= np.maximum(room, 1e-4 * (1 + np.abs(wide)))).all()


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_round_trips(kind: str, tmp_path: Path) -> None:
    model = tiny(kind).model
    before = run(model, [Prune(keep=0.4), Cluster(entries=4), Entropy()])
    save(before, tmp_path / "m.tersor")
    after = load(tmp_path / "m.tersor")
    assert after.ledger.entries == before.ledger.entries
    assert after.ledger.digest == before.ledger.digest
    assert (after.ledger.base, after.ledger.recipe) == (before.ledger.base, before.ledger.recipe)
    assert after.digest == before.digest
    assert after.aliases == before.aliases
    assert dict(after.sites) == dict(before.sites)
    assert after.given is after.base is None
    for name, value in after.model(model).state_dict().items():
        assert same_bits(value, before.model().state_dict()[name])


def test_same_result_same_bytes(tmp_path: Path) -> None:
    before = run(tiny("mlp").model, [Prune(keep=0.5), Entropy()])
    save(before, tmp_path / "a.tersor")
    save(before, tmp_path / "b.tersor")
    save(load(tmp_path / "a.tersor"), tmp_path / "c.tersor")
    first = (tmp_path / "a.tersor").read_bytes()
    assert first == (tmp_path / "b.tersor").read_bytes() == (tmp_path / "c.tersor").read_bytes()


def test_without_ledger(tmp_path: Path) -> None:
    before = run(tiny("mlp").model, [Prune(keep=0.5), Quantize(bits=4)])
    assert save(before, tmp_path / "b.tersor", ledger=False) < save(before, tmp_path / "a.tersor")
    after = load(tmp_path / "b.tersor")
    assert (after.ledger.base, after.ledger.recipe, after.ledger.entries) == (before.ledger.base, {}, [])
    assert after.digest == before.digest


def odd_ledgers() -> Iterator[tuple[str, Ledger]]:
    recipe = {"tersor": 1, "seed": 0, "steps": [{"prune": {}}, {"entropy": {}}]}
    form, other = Dense(torch.ones(2)).digest, Dense(torch.zeros(2)).digest
    yield "no recipe", Ledger("", {}, [Entry(0, "prune", "w", kind="done", text="")])
    yield "step left out", Ledger("", recipe, [Entry(1, "entropy", "w", "lossless", other, form)])
    yield (
        "other name",
        Ledger("", recipe, [Entry(0, "mine", "", kind="a", text="b", data={"c": [1, {"d": None}]})]),
    )
    yield (
        "steps in turn",
        Ledger(
            "",
            recipe,
            [
                Entry(n, name, "w", kind="k", text="t")
                for n, name in ((0, "prune"), (1, "entropy"), (0, "prune"))
            ],
        ),
    )
    yield (
        "chain broken",
        Ledger(
            "",
            recipe,
            [Entry(0, "prune", "w", "wrap", other, other), Entry(0, "prune", "w", "refine", form, other)],
        ),
    )
    yield "site that is gone", Ledger("", recipe, [Entry(0, "prune", "gone", "wrap", other, form)])
    yield "other letters", Ledger("", {"steps": [], "größe": "大"}, [])


@pytest.mark.parametrize(("name", "ledger"), list(odd_ledgers()), ids=[name for name, _ in odd_ledgers()])
def test_any_ledger_round_trips(name: str, ledger: Ledger, tmp_path: Path) -> None:
    save(result({"w": Dense(torch.ones(2))}, ledger), tmp_path / "m.tersor")
    after = load(tmp_path / "m.tersor").ledger
    assert (after.base, after.recipe, after.entries) == (ledger.base, ledger.recipe, ledger.entries)
    file = reference.opened(tmp_path / "m.tersor")
    assert [(e["step"], e["name"], e["about"]) for e in file.events] == [
        (e.step, e.name, e.site) for e in ledger.entries
    ]
    assert [(e["before"], e["after"]) for e in file.events] == [(e.before, e.after) for e in ledger.entries]
    assert file.ledger == ledger.digest == after.digest


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    for data in ({"loss": float("nan")}, {"model": object()}):
        ledger = Ledger("", {}, [Entry(0, "prune", "", kind="done", text="", data=data)])
        with pytest.raises(RefusedError, match="the file's text cannot be written"):
            save(result({"w": Dense(torch.ones(2))}, ledger), tmp_path / "m.tersor")
    assert list(tmp_path.iterdir()) == []


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    masked = Masked(Dense(torch.ones(2, dtype=torch.bool)), Dense(torch.ones(2)))
    with pytest.raises(RefusedError, match="a:keep: two tensors"):
        save(result({"a": masked, "a:keep": Dense(torch.ones(2))}), tmp_path / "m.tersor")
    with pytest.raises(RefusedError, match="tersor: two tensors"):
        save(result({"tersor": Dense(torch.ones(2))}), tmp_path / "m.tersor")
    with pytest.raises(RefusedError, match="utf-8"):
        save(result({"\ud800": Dense(torch.ones(999))}), tmp_path / "m.tersor")


def test_a_form_that_readers_refuse_is_not_written(tmp_path: Path) -> None:
    bad = Masked(Dense(torch.ones(2, dtype=torch.bool)), Dense(torch.ones(3)))
    sites = {"w": Site("w", (2,), "float32", "linear")}
    with pytest.raises(FormatError, match=r"w: mask \[2\], body \[3\]"):
        save(State(sites, {"w": bad}, {}, Ledger("", {})), tmp_path / "m.tersor")


# --- what the file looks like ---


@pytest.fixture(scope="module")
def lenet() -> State:
    """LeNet-300-100, pruned, clustered and coded. Random weights change the coded bytes only."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    for number, (ins, outs) in enumerate(((784, 300), (300, 100), (100, 10)), 1):
        model.add_module(f"fc{number}", torch.nn.Linear(ins, outs))
    return run(model, [Prune(keep=0.08, per="tensor"), Cluster(entries=16), Entropy()])


def test_overhead_is_small(lenet: State, tmp_path: Path) -> None:
    before = lenet
    assert save(before, tmp_path / "m.tersor") - before.nbytes <= 1010
    assert save(before, tmp_path / "m.tersor", ledger=False) - before.nbytes <= 660


def test_other_readers_open_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    forms = {
        "a": Dense(torch.randn(40, 40)), "b": Dense(torch.randn(32, 32).bfloat16()),
        "c": Dense(torch.arange(2000)),
        "d": Coded(torch.zeros(2001, dtype=torch.uint8), (2000,), "uint8", (2001,)),
        "e": Dense(torch.randn(50, 50, dtype=torch.float64)), "f": Dense(torch.ones(3)),
    }  # fmt: skip
    save(result(forms), tmp_path / "m.tersor")
    found = safetensors.load_file(tmp_path / "m.tersor")
    assert found.keys() == {"a", "b", "c", "d", "e", "tersor"}
    for name in "abce":
        assert torch.equal(found[name], forms[name].decode())


def test_wide_elements_are_aligned(tmp_path: Path) -> None:
    forms = {
        str(number): Dense(torch.zeros(1024 + number, dtype=dtype))
        for number, dtype in enumerate((torch.uint8, torch.float64, torch.int16, torch.float32, torch.bool))
    }
    save(result(forms), tmp_path / "m.tersor")
    with TersorFile(tmp_path / "m.tersor") as file:
        assert all(slot.begin % slot.dtype.itemsize == 0 for slot in file.source.slots.values())


def test_leaves_are_named_by_site_and_path(tmp_path: Path) -> None:
    keep = torch.rand(64, 64) < 0.5
    forms = {"fc.weight": Masked(Dense(keep), Dense(torch.randn(64, 64))), "fc.bias": Dense(torch.randn(10))}
    save(result(forms), tmp_path / "m.tersor")
    header, _ = header_of((tmp_path / "m.tersor").read_bytes())
    assert header.keys() == {"__metadata__", "fc.weight:keep", "fc.weight:body", "tersor"}
    assert take_apart((tmp_path / "m.tersor").read_bytes()).small == as_bytes(forms["fc.bias"].decode())


def test_text_can_be_read_as_the_page_says(lenet: State, tmp_path: Path) -> None:
    save(lenet, tmp_path / "m.tersor")
    header, payload = header_of((tmp_path / "m.tersor").read_bytes())
    b = payload[slice(*header["tersor"]["data_offsets"])]
    text = zlib.decompressobj(-15, zdict=reference.DICTIONARY).decompress(b)
    assert list(json.loads(text)["sites"]) == [f"fc{n}.{what}" for n in "123" for what in ("weight", "bias")]


def test_other_byte_orders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.tersor"
    save(result({"w": Dense(torch.ones(2))}), path)
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(RefusedError, match="big-endian"):
        load(path)
    with pytest.raises(RefusedError, match="big-endian"):
        save(result({"w": Dense(torch.zeros(2))}), path)
    monkeypatch.undo()
    assert load(path).forms["w"].digest == Dense(torch.ones(2)).digest


# --- one tensor, and tied ones ---


def test_read_one_tensor(lenet: State, tmp_path: Path) -> None:
    before = State(lenet.sites, lenet.forms, {"tied": "fc2.weight"}, lenet.ledger)
    path = tmp_path / "m.tersor"
    save(before, path)
    for name, tensor in before.state_dict().items():
        assert same_bits(read_tensor(path, name), tensor)
    with pytest.raises(SiteError, match="no tensor 'fc2.weigth'; did you mean 'fc2.weight'"):
        read_tensor(path, "fc2.weigth")


def test_reading_one_tensor_needs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "m.tersor"
    forms = {name: Dense(torch.randn(30, 30)) for name in "ab"}
    save(result(forms), path)
    data = bytearray(path.read_bytes())
    with TersorFile(path) as file:
        data[file.source.slots["b"].begin] ^= 1
    path.write_bytes(data)
    assert same_bits(read_tensor(path, "a"), forms["a"].array)
    with pytest.raises(FormatError, match=f"^{path}: b: damaged"):
        read_tensor(path, "b")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing.tersor: cannot be read: No such file"):
        load(tmp_path / "nothing.tersor")
    with pytest.raises(StorageError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("value", [{}, {"w": 1}, [], "x", None, 3.5, True])
@pytest.mark.parametrize("key", KEYS)
def test_wrong_types_in_the_text(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.tersor"
    save(result({"w": Dense(torch.ones(2))}), path)
    pieces = take_apart(path.read_bytes())
    pieces.document[key] = value
    path.write_bytes(pieces.bytes())
    fine = {"recipe": ({}, {"w": 1})}
    fine |= dict.fromkeys(("aliases", "grids", "attachments"), ({},))
    fine |= dict.fromkeys(("indices", "changes", "past", "ledger"), ([],))
    if value in fine.get(key, ()) and not isinstance(value, bool):
        assert load(path).forms["w"].digest == Dense(torch.ones(2)).digest
        return
    with pytest.raises(FormatError):
        load(path)
