"""What a file holds beside its forms: cuts, changes of modules, grids of edges, attachments, a long ledger.

Both readers restore it; damage is reported by name; no part of it makes a reader allocate more than the
limits of docs/format.md allow.
"""

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import reference, take_apart
from hypothesis import given
from hypothesis import strategies as st
from random_forms import forms
from torch import nn

from tersor.core.history import undo
from tersor.core.run import run
from tersor.core.state import State, start
from tersor.encode import coded
from tersor.errors import FormatError, RefusedError
from tersor.forms import Coded, Dense, Form, Grid
from tersor.io.container import TersorFile, load
from tersor.io.container_writer import save
from tersor.io.document import INDICES, runs_of
from tersor.io.json_text import dump
from tersor.io.ledger_json import history_to_json
from tersor.io.patch.diff import diff
from tersor.io.patch.patch import patch
from tersor.io.verify import verify
from tersor.model.changes import Replace, Set
from tersor.model.sites import Site
from tersor.record.ledger import Entry, Ledger
from tersor.steps import Quantize

WORD = st.text(st.characters(codec="utf-8", exclude_characters=":"), min_size=1, max_size=8)
NUMBER = st.integers(-(2**31) + 1, 2**31 - 1)
PART = st.text("abc.é _-1", min_size=1, max_size=6).filter(lambda part: part.strip("."))


@st.composite
def cut_sites(draw: Any) -> tuple[dict[str, Site], dict[str, Form], dict[str, dict[int, tuple[int, ...]]]]:
    """Sites with random forms, some with cut axes; lists of indices may be shared."""
    sites, stored, kept, lists = {}, {}, {}, []
    for number in range(draw(st.integers(0, 4))):
        form = draw(forms(shapes=((5, 3, 3, 3), (2, 6, 5), (5,), (1, 7), ())))
        name, given_shape = f"layer.{number}", list(form.shape)
        for axis, count in enumerate(form.shape):
            fitting = [one for one in lists if len(one) == count]
            if not draw(st.booleans()):
                continue
            if fitting and draw(st.booleans()):
                index = draw(st.sampled_from(fitting))
            else:
                index = tuple(draw(st.permutations(range(count + 4)))[:count])
            lists.append(index)
            kept.setdefault(name, {})[axis] = index
            given_shape[axis] = max(index) + draw(st.integers(1, 3))
        dtype = str(form.decode().dtype).removeprefix("torch.")
        sites[name] = Site(name, tuple(given_shape), dtype, "linear", layer="layer")
        stored[name] = form
    return sites, stored, kept


@st.composite
def some_grids(draw: Any) -> dict[str, Grid]:
    found = {}
    for edge in draw(st.lists(WORD, max_size=3, unique=True)):
        if draw(st.integers(0, 3)) == 0:
            found[f"{edge}/op:0"] = Grid(stale=draw(st.booleans()))  # dynamic
            continue
        count, bits, signed = (
            draw(st.sampled_from((1, 3, 300))),
            draw(st.integers(1, 16)),
            draw(st.booleans()),
        )
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        zero = torch.randint(0, 2**bits, (count,), generator=generator) - (2 ** (bits - 1) if signed else 0)
        scale = torch.rand(count, generator=generator) + 0.01
        leaf: Callable[[torch.Tensor], Form] = draw(st.sampled_from((Dense, lambda t: coded(t, None, "raw"))))
        whole = (
            None if draw(st.booleans()) else leaf(zero.to(draw(st.sampled_from((torch.int32, torch.int64)))))
        )
        found[f"{edge}/op:0"] = Grid(
            leaf(scale), whole, bits, signed, draw(st.integers(0, 3)), draw(st.booleans())
        )
    return found


CHANGES = st.lists(
    st.builds(Set, WORD, WORD, NUMBER)
    | st.builds(Replace, WORD, WORD, st.dictionaries(WORD, NUMBER | WORD, max_size=3)),
    max_size=4,
)
ATTACHMENTS = st.dictionaries(
    st.lists(PART, min_size=1, max_size=3).map("/".join),
    st.binary(max_size=50) | st.binary(min_size=1, max_size=4).map(lambda data: data * 700),
    max_size=3,
)
LINES = st.lists(st.tuples(WORD, st.binary(min_size=8, max_size=8).map(bytes.hex)), max_size=4)


@st.composite
def states(draw: Any) -> State:
    sites, stored, kept = draw(cut_sites())
    grids = draw(some_grids())
    past, count = draw(LINES), draw(st.integers(0, 3))
    seeds = draw(st.lists(st.integers(0, 2**40), min_size=count, max_size=count))
    recipe = {"tersor": 1, "seed": draw(st.sampled_from((seeds, 3))), "steps": [{"step": {"a": 0.1}}] * count}
    ledger = Ledger("0123456789abcdef", recipe if count else {}, past=tuple(past))
    one = "00112233445566ff"
    for number in range(count):
        at = len(past) + number
        for name, form in stored.items():
            how = draw(st.sampled_from(("wrap", "cut", "lossless")))
            data = {"axis": 0, "count": 2, "kept": one} if how == "cut" else {}
            after = draw(st.sampled_from((one, form.digest)))
            before = draw(st.sampled_from((one, form.digest)))
            ledger.entries.append(Entry(at, "step", name, how, before, after, data=data))
            ledger.entries.append(Entry(at, "step", name, kind="done", text="so", data={"n": [1.5, None]}))
        for edge, grid in grids.items():
            ledger.entries.append(
                Entry(at, "step", edge, "absorb", draw(st.sampled_from(("", one))), grid.digest)
            )
        data = {"stock": "product", "settings": {"layers": 2}}
        ledger.entries.append(Entry(at, "step", "fc", "replace", data=data))
        ledger.entries.append(Entry(at, "step", "", "set", data={"attribute": "n", "value": -1}))
    return State(
        sites, stored, {}, ledger, kept=kept, changes=tuple(draw(CHANGES)), grids=grids,
        attachments=draw(ATTACHMENTS),
    )  # fmt: skip


def alike(one: State, other: State) -> bool:
    return (
        one.digest == other.digest and dict(one.sites) == dict(other.sites) and one.kept == other.kept
        and one.changes == other.changes and one.attachments == other.attachments
        and {edge: grid.digest for edge, grid in one.grids.items()}
        == {edge: grid.digest for edge, grid in other.grids.items()}
    )  # fmt: skip


@given(states())
def test_everything_round_trips(tmp_path_factory: pytest.TempPathFactory, state: State) -> None:
    path = tmp_path_factory.mktemp("held") / "m.tersor"
    save(state, path)
    after = load(path)
    assert alike(after, state)
    assert after.ledger.entries == state.ledger.entries
    assert (after.ledger.recipe, after.ledger.past) == (state.ledger.recipe, state.ledger.past)
    assert after.ledger.digest == state.ledger.digest
    assert {name: after.shape(name) for name in after.sites} == {n: f.shape for n, f in state.forms.items()}
    again = path.with_name("again.tersor")
    save(after, again)
    assert again.read_bytes() == path.read_bytes()
    file = reference.opened(path)
    assert (file.digest, file.ledger) == (state.digest, state.ledger.digest)
    assert file.attachments == state.attachments
    assert {n: {a: tuple(i) for a, i in axes.items()} for n, axes in file.kept.items()} == state.kept


@given(states())
def test_short_header_keeps_all_but_ledger_and_attachments(
    tmp_path_factory: pytest.TempPathFactory, state: State
) -> None:
    path = tmp_path_factory.mktemp("held") / "m.tersor"
    bare = replace(state, attachments={})
    save(bare, path, tiny=True)
    assert alike(load(path), bare)
    assert reference.opened(path).digest == state.digest
    if state.attachments:
        with pytest.raises(RefusedError, match="short header holds no attachment"):
            save(state, path, tiny=True)


@pytest.mark.wide
@given(states(), states())
def test_patches_between_them(tmp_path_factory: pytest.TempPathFactory, old: State, new: State) -> None:
    import patcher

    folder = tmp_path_factory.mktemp("patch")
    save(old, folder / "old")
    save(new, folder / "new")
    diff(folder / "old", folder / "new", folder / "p")
    patch(folder / "old", folder / "p", folder / "out")
    assert (folder / "out").read_bytes() == (folder / "new").read_bytes()
    if text_of(folder / "old") == text_of(folder / "new"):
        return  # which the reference reader does not support
    found = patcher.patched(folder / "old", folder / "p")
    kinds = ("attachment:",)
    stored = {name: v.values.tobytes() for name, v in found.items() if name.startswith(kinds)}
    pieces = take_apart((folder / "new").read_bytes())
    assert stored == {n: data for n, (_, _, data) in pieces.tensors.items() if n.startswith(kinds)}


# --- cuts ---


@pytest.mark.parametrize("indices", [(0,), (3, 2, 1), (0, 1, 2, 7, 8), (5, 6, 0, 1)])
def test_runs(indices: tuple[int, ...]) -> None:
    runs = runs_of(indices)
    pairs = zip(runs[::2], runs[1::2], strict=True)
    assert tuple(first + n for first, count in pairs for n in range(count)) == indices
    assert len(runs) <= 2 * len(indices)


def test_sites_cut_together_share_a_list(tmp_path: Path) -> None:
    some = (0, 1, 5)
    sites = {name: Site(name, (8,), "float32", "other") for name in "abc"}
    state = State(
        sites,
        {name: Dense(torch.ones(3)) for name in sites},
        {},
        Ledger(""),
        kept=dict.fromkeys("abc", {0: some}),
    )
    save(state, tmp_path / "m.tersor")
    document = take_apart((tmp_path / "m.tersor").read_bytes()).document
    assert document["indices"] == [[0, 2, 5, 1]]
    assert [site["kept"] for site in document["sites"].values()] == [{"0": 0}] * 3


@pytest.mark.parametrize("index", [(0, 0), (0, 8), (-1, 0)])
def test_a_cut_that_readers_refuse_is_not_written(index: tuple[int, ...], tmp_path: Path) -> None:
    sites = {"w": Site("w", (8,), "float32", "other")}
    state = State(sites, {"w": Dense(torch.ones(2))}, {}, Ledger(""), kept={"w": {0: index}})
    with pytest.raises(RefusedError, match="w: its cut of axis 0 keeps an index twice, or one out of range"):
        save(state, tmp_path / "m.tersor")


def test_many_indices_are_justified_by_bytes(tmp_path: Path) -> None:
    """Written and read up to the limit; the writer refuses one index more, as readers do."""
    path, large = tmp_path / "m.tersor", INDICES // 2
    forms: dict[str, Form] = {
        name: Coded(torch.tensor([1, 7], dtype=torch.uint8), (large + more,), "uint8", (2,))
        for name, more in (("a", 0), ("b", 1), ("c", 2))
    }

    def state(*names: str) -> State:
        shapes = {name: forms[name].shape[0] for name in names}
        sites = {name: Site(name, (shapes[name] + 1,), "uint8", "other") for name in names}
        kept = {name: {0: tuple(range(shapes[name]))} for name in names}
        return State(sites, {name: forms[name] for name in names}, {}, Ledger(""), kept=kept)

    save(state("a", "b"), path)
    tracemalloc.start()
    try:
        with TersorFile(path) as file:
            assert file.shape("b") == (large + 1,)
        assert tracemalloc.get_traced_memory()[1] < 48 * INDICES + (4 << 20)
    finally:
        tracemalloc.stop()
    assert load(path).shape("b") == (large + 1,)
    with pytest.raises(RefusedError, match="more indices than a file of this size may list: 1,048,576"):
        save(state("a", "b", "c"), path)


def test_a_claim_of_many_indices_takes_no_memory() -> None:
    path = reference.PAGE.parents[1] / "tests" / "golden" / "refused" / "cut-bomb.tersor"
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="the lists hold 1,073,741,824 indices"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- grids and attachments ---


def full() -> State:
    sites = {"w": Site("w", (40, 30), "float32", "linear")}
    scale, zero = torch.rand(700) + 0.1, torch.randint(0, 256, (700,), dtype=torch.uint8)
    grids = {"fc/linear:0": Grid(Dense(scale), Dense(zero)), "fc/relu:0": Grid(Dense(torch.ones(1)))}
    files = {"config.json": b'{"layers": 2, "width": 30}' * 90, "raw": bytes(range(256)) * 5}
    return State(sites, {"w": Dense(torch.randn(40, 30))}, {}, Ledger(""), grids=grids, attachments=files)


def test_verify_has_a_row_for_each(tmp_path: Path) -> None:
    save(full(), tmp_path / "m.tersor")
    rows = verify(tmp_path / "m.tersor")
    names = ["", "w", "fc/linear:0", "fc/relu:0", "attachment:config.json", "attachment:raw"]
    assert [row.site for row in rows] == names
    assert all(row.sound for row in rows)
    assert [row.nbytes for row in rows[1:4]] == [4800, 3500, 4]
    assert rows[5].nbytes <= 1280
    assert rows[4].nbytes < 300  # its size in the file


@pytest.mark.parametrize("name", ["fc/linear:0:scale", "attachment:config.json", "attachment:raw"])
def test_verify_names_damaged_parts(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.tersor"
    save(full(), path)
    with TersorFile(path) as file:
        at = file.source.slots[name].begin + 9
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
    wrong = [row for row in verify(path) if not row.sound]
    assert [row.site for row in wrong] == [name.removesuffix(":scale")]
    assert "damaged" in wrong[0].text
    with pytest.raises(FormatError, match="damaged"):
        load(path)


def test_verify_compares_grids_with_the_ledger(tmp_path: Path) -> None:
    """A grid that only became stale matches the ledger; another grid does not."""
    state, edge = full(), "fc/relu:0"
    entry = Entry(0, "calibrate", edge, "absorb", "", state.grids[edge].digest)
    stale = {**state.grids, edge: state.grids[edge].replace(stale=True)}
    other = {**state.grids, edge: state.grids[edge].replace(bits=4)}
    for grids, sound in ((state.grids, True), (stale, True), (other, False)):
        save(replace(state, grids=grids, ledger=Ledger("", {}, [entry])), tmp_path / "m.tersor")
        assert [row.site for row in verify(tmp_path / "m.tersor") if not row.sound] == (
            [] if sound else [edge]
        )


def test_verify_knows_what_a_replacement_removes(tmp_path: Path) -> None:
    """Edits of sites that a replacement removed or made again are no fault; edits of unknown sites are."""
    one, form = "00112233445566ff", Dense(torch.ones(2))
    entries = [
        Entry(0, "factorize", "fc.weight", "absorb", one, "0" * 16),
        Entry(0, "factorize", "fc.bias", "absorb", one, "1" * 16),
        Entry(0, "factorize", "fc", "replace", data={"stock": "product", "settings": {"layers": 2}}),
        Entry(0, "factorize", "fcx.weight", "absorb", one, "2" * 16),
    ]
    sites = {"fc.bias": Site("fc.bias", (2,), "float32", "linear", layer="fc", origin="fc.bias")}
    save(State(sites, {"fc.bias": form}, {}, Ledger("", {}, entries)), tmp_path / "m.tersor")
    assert [row.site for row in verify(tmp_path / "m.tersor") if not row.sound] == ["fcx.weight"]


@pytest.mark.parametrize("name", ["", "../up", "a//b", "/root", "a\\b", "c:x", "a/..", "bell\a"])
def test_names_that_leave_a_folder_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is no name of an attachment"):
        save(replace(full(), attachments={name: b"x"}), tmp_path / "m.tersor")


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (Grid(Dense(torch.zeros(1))), "not a number above 0"),
        (Grid(Dense(torch.ones(1)), Dense(torch.tensor([256]))), "a zero is one of the codes 0 to 255"),
        (Grid(Dense(torch.ones(2)), Dense(torch.tensor([1]))), r"a zero of torch.int64 \[1\]"),
        (Grid(Dense(torch.ones(1)), bits=0), "bits 0"),
        (Grid(bits=4), "a grid without a scale is dynamic: it has 8 bits, and no other setting"),
        (Grid(signed=True), "without a scale"),
        (Grid(zero=Dense(torch.ones(1, dtype=torch.int16))), "without a scale"),
    ],
)
def test_a_grid_that_readers_refuse_is_not_written(grid: Grid, says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=says):
        save(replace(full(), grids={"edge": grid}), tmp_path / "m.tersor")


def test_a_site_and_an_edge_of_one_name_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="a site and an edge of the graph have this name"):
        save(replace(full(), grids={"w": Grid(Dense(torch.ones(1)))}), tmp_path / "m.tersor")


def test_an_equal_attachment_costs_a_patch_nothing(tmp_path: Path) -> None:
    state = replace(full(), attachments={"blob": torch.randint(0, 256, (9000,)).byte().numpy().tobytes()})
    save(state, tmp_path / "old")
    save(replace(state, forms={"w": Dense(torch.ones(40, 30))}), tmp_path / "new")
    assert diff(tmp_path / "old", tmp_path / "new", tmp_path / "p").nbytes < 1500
    patch(tmp_path / "old", tmp_path / "p", tmp_path / "out")
    assert load(tmp_path / "out").attachments == state.attachments


def test_an_attachment_is_deflated_where_that_is_shorter(tmp_path: Path) -> None:
    save(full(), tmp_path / "m.tersor")
    pieces = take_apart((tmp_path / "m.tersor").read_bytes())
    entry = pieces.document["attachments"]["config.json"]
    data = full().attachments["config.json"]
    assert entry == {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "deflated": True}
    assert len(pieces.tensors["attachment:config.json"][2]) < len(data) // 32 + 65536


# --- the ledger ---


def text_of(path: Path) -> Any:
    return take_apart(path.read_bytes()).document


def history_of(path: Path) -> int:
    """Bytes of past, recipe and ledger as JSON."""
    document = text_of(path)
    history = {key: document[key] for key in ("past", "recipe", "ledger") if key in document}
    return len(json.dumps(history, ensure_ascii=False, separators=(",", ":")).encode())


def test_a_chain_of_runs_through_files(tmp_path: Path) -> None:
    """60 runs, each from the file of the run before: the ledger stays within its limit and keeps its digest;
    undo reports what is missing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5, bias=False))
    path, memory = tmp_path / "m.tersor", start(model)
    save(memory, path)
    lines = 0
    for number in range(60):
        steps = [Quantize(bits=2 + number % 7)]
        memory, state = run(memory, steps, seed=number % 3), run(load(path), steps, seed=number % 3)
        assert state.ledger.digest == memory.ledger.digest
        save(state, path)
        after = load(path)
        assert after.ledger.digest == memory.ledger.digest
        assert after.ledger.count == number + 1
        assert after.ledger.step_names() == ["quantize"] * (number + 1)
        assert after.digest == memory.digest
        assert history_of(path) <= 4000 + 100 * len(after.sites) * (number + 1)
        assert len(after.ledger.past) >= lines
        lines = len(after.ledger.past)
    assert 5 < lines < 60  # some were shortened to lines, no more than necessary
    assert history_to_json(memory.ledger, {"0.weight": memory.forms["0.weight"].digest}, 1) == {
        key: text_of(path)[key] for key in ("past", "recipe", "ledger")
    }
    save(memory, tmp_path / "at-once.tersor")
    assert (tmp_path / "at-once.tersor").read_bytes() == path.read_bytes()

    with pytest.raises(RefusedError, match="only a journal keeps past weights"):
        undo(after, 1)
    with pytest.raises(RefusedError, match=f"names of the first {lines} steps.*at most {60 - lines} "):
        undo(after, 60 - lines + 1)
    with pytest.raises(RefusedError, match="needs the model as it was first given"):
        undo(after)
    assert undo(after.on(model)).digest == start(model).digest


def test_no_more_steps_become_lines_than_necessary() -> None:
    """With one step less in `past` it would be too long."""
    steps = [{"quantize": {"bits": 8, "note": "x" * 300}} for _ in range(40)]
    entries = [Entry(n, "quantize", "w", "refine", f"{n:016x}", f"{n + 1:016x}") for n in range(40)]
    ledger = Ledger("0" * 16, {"tersor": 1, "seed": 0, "steps": steps}, entries)
    history = history_to_json(ledger, {"w": entries[-1].after}, 1)
    count = len(history["past"])
    assert 0 < count < 40
    longer = ledger.brief(count - 1)
    events = history_to_json(longer, {"w": entries[-1].after}, 10**6)
    assert len(dump(history)) <= 4000 + 100 * 40 < len(dump(events))


def test_an_ordinary_run_of_a_large_network_keeps_every_step() -> None:
    """A network without biases: seven matrices and two norms per layer, an edit and a note for each in each
    step that processes it."""
    names = [f"model.layers.{n}.self_attn.{m}.weight" for n in range(32) for m in "abcdefgxy"]
    weights = [name for name in names if name[-8] not in "xy"]
    steps = [{"prune": {"keep": 0.5}}, {"quantize": {"bits": 8}}, {"entropy": {"coder": "max"}}]
    ledger = Ledger("0" * 16, {"tersor": 1, "seed": 0, "steps": steps})
    hows = (
        ("prune", "wrap", "kept 8388608 of 16777216 weights (50.0%)", {"kept": 8388608}),
        ("quantize", "refine", "8 bits, signal to noise 40.1 dB", {"decibels": 40.1}),
        ("entropy", "lossless", "16777216 to 12345678 bytes", {"before": 16777216, "after": 12345678}),
    )
    digests = {name: f"{number:016x}" for number, name in enumerate(names)}
    for at, (name, how, text, data) in enumerate(hows):
        for number, site in enumerate(names if name == "entropy" else weights):
            ends = [f"{number:08x}{at + end:08x}" for end in (0, 1)]
            ends[1] = digests[site] if at == 2 else ends[1]
            ledger.entries.append(Entry(at, name, site, how, *ends))
            ledger.entries.append(Entry(at, name, site, kind="done", text=text, data=data))
    assert "past" not in history_to_json(ledger, digests, len(names))


def test_no_times_are_in_a_file(tmp_path: Path) -> None:
    model = nn.Linear(5, 5)
    for name in ("a", "b"):
        save(run(model, [Quantize()]), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "second" not in json.dumps(text_of(tmp_path / "a"))


def test_a_long_text_is_clipped(tmp_path: Path) -> None:
    entry = Entry(0, "step", "w", kind="done", text="x" * 2000)
    state = replace(full(), ledger=Ledger("", {}, [entry]))
    save(state, tmp_path / "m.tersor")
    (after,) = load(tmp_path / "m.tersor").ledger.entries
    assert after.text == "x" * 397 + "..."
    assert load(tmp_path / "m.tersor").ledger.digest == state.ledger.digest
