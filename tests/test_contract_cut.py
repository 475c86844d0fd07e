"""The contract of steps that cut: tests/halving.py alone and with every other step in both orders, undone,
replayed, killed, resumed, saved, loaded, locked. Cut networks are compared with networks masked by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from halving import CUTTABLE, Halving
from test_contract import DEAR, on_disk, outcome, sound, step, there_and_back
from tiny import TRAINED, Tiny, tiny
from torch import nn

from tersor.core.history import undo
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import TersorError
from tersor.forms import Coded, uncoded
from tersor.io.container import load
from tersor.record.events import Cut, Group
from tersor.steps import STEPS, Entropy, Prune, Quantize, Rdoq
from tersor.steps.recipe_text import dump, from_yaml, lock

TABLE = STEPS | {"halving": Halving}
OTHERS = [name for name in STEPS if name not in DEAR]


def cuttable(name: str) -> Tiny:
    return tiny(name, models=CUTTABLE)


def notes(result: State, kind: str) -> list[str]:
    return [entry.text.split(":")[0] for entry in result.ledger.notes(kind)]


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_cut_alone(name: str, tmp_path: Path) -> None:
    given = cuttable(name)
    result = outcome(given, [Halving(name)], tmp_path)
    sound(result, given, tmp_path / "journal")
    there_and_back(result, given, tmp_path / "journal")
    on_disk(result, tmp_path)
    fresh = tiny(name, seed=9, models=CUTTABLE).model
    assert torch.equal(given.out(load(tmp_path / "model.tersor").model(fresh)), given.out(result.model()))
    count = sum(p.numel() for p in result.model().parameters())
    assert (count < sum(p.numel() for p in given.model.parameters())) == (name != "lstm")


PROVED = {
    "mlp": ["first", "last"], "conv": ["stream"], "tied": ["width"], "lstm": [],
    "mixed": ["point", "line", "back", "up", "depthwise"], "heads": ["own", "stock", "multi"],
}  # fmt: skip


@pytest.mark.parametrize("name", CUTTABLE)
def test_every_group_is_proved_or_undone_as_a_whole(name: str) -> None:
    given = cuttable(name)
    result = run(given.model, Halving(name), given.task)
    assert sorted(notes(result, "proved")) == sorted(PROVED[name])
    assert notes(result, "refused") == (["plain"] if name == "heads" else [])
    if name == "heads":  # nothing of the plain cut is left: later groups cut the same sites
        assert [e.how for e in result.ledger.entries if e.site == "multi"] == ["replace", "set"]
        assert result.model().get_submodule("multi").num_heads == 1
        assert result.model().num_heads == 2
    if name == "mixed":
        assert result.model().get_submodule("depthwise").groups == 4


def zeroed(model: nn.Module, **columns: tuple[int, list[int]]) -> nn.Module:
    """The model with zeros in some columns of some weights, by hand."""
    with torch.no_grad():
        for name, (axis, gone) in columns.items():
            model.get_parameter(name.replace("__", ".")).index_fill_(axis, torch.tensor(gone), 0)
    return model


BY_HAND = {
    "mlp": {"layers__2__weight": (1, [6]), "layers__6__weight": (1, [6])},
    "conv": {"block__weight": (1, [6]), "head__weight": (1, [6])},
    "tied": {"embed__weight": (1, [7]), "mix__weight": (1, [7])},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_outputs_are_those_of_a_network_masked_by_hand(name: str) -> None:
    given = cuttable(name)
    result = run(given.model, Halving(name), given.task)
    want = given.out(zeroed(cuttable(name).model, **BY_HAND[name]))
    torch.testing.assert_close(given.out(result.model()), want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(want, given.out(), rtol=1e-3)


def pairs() -> list[tuple[str, str]]:
    """Each step before and after the cut, each on one of the models."""
    return [(names[i % len(names)], other) for i, other in enumerate(OTHERS) for names in (list(CUTTABLE),)]


@pytest.mark.sampled("other", "after")
@pytest.mark.parametrize("after", [False, True], ids=["cut first", "cut last"])
@pytest.mark.parametrize(("name", "other"), pairs())
def test_with_every_step_in_both_orders(name: str, other: str, after: bool, tmp_path: Path) -> None:
    given = cuttable(name)
    trained = step(other, trained=other in TRAINED)
    steps = [trained, Halving(name)] if after else [Halving(name), trained]
    result = outcome(given, steps, tmp_path)
    sound(result, given, tmp_path / "journal")
    there_and_back(result, given, tmp_path / "journal")
    assert (
        undo(result, 1, journal=tmp_path / "journal").digest == run(given.model, steps[:1], given.task).digest
    )
    on_disk(result, tmp_path)
    if name != "lstm":
        assert notes(result, "proved"), "nothing was cut"


@pytest.mark.sampled(name=("mlp", "conv", "tied"))
@pytest.mark.parametrize("name", [name for name in CUTTABLE if name != "lstm"])
def test_a_second_cut_names_given_indices(name: str) -> None:
    given = cuttable(name)
    once = run(given.model, Halving(name), given.task)
    twice = run(once, Halving(name), given.task)
    assert twice.digest == run(given.model, [Halving(name), Halving(name)], given.task).digest
    for site, axes in twice.kept.items():
        for axis, kept in axes.items():
            assert set(kept) <= set(once.present(site, axis))
            whole = given.model.state_dict().get(site)
            if whole is not None:
                assert twice.shape(site)[axis] == len(kept)
    for site, axes in twice.kept.items():
        if site in given.model.state_dict():
            want = given.model.state_dict()[site]
            for axis, kept in axes.items():
                want = want.index_select(axis, torch.tensor(kept))
            assert torch.equal(twice.forms[site].decode(), want)


@pytest.mark.sampled(name="conv")
@pytest.mark.parametrize("name", ["conv", "heads"])
def test_it_resumes_after_a_kill_at_any_group(name: str, tmp_path: Path) -> None:
    given, recipe = cuttable(name), Recipe((Prune(keep=0.6), Halving(name), Entropy()))
    whole = run(given.model, recipe, given.task, journal=tmp_path / "whole")
    files = sorted((tmp_path / "whole").glob("[0-9]*.group"))
    for count in range(len(files)):
        folder = tmp_path / str(count)
        folder.mkdir()
        for path in [tmp_path / "whole" / "head.json", *files[:count]]:
            shutil.copy(path, folder)
        again = run(given.model, recipe, given.task, journal=folder, resume=True)
        assert again.digest == whole.digest
        assert again.ledger.digest == whole.ledger.digest


@pytest.mark.sampled(name=("mlp", "conv", "lstm"))
@pytest.mark.parametrize("name", CUTTABLE)
def test_a_lock_runs_again(name: str) -> None:
    given = cuttable(name)
    result = run(given.model, [Quantize(bits=4), Halving(name)], given.task)
    recipe = from_yaml(dump(json.loads(json.dumps(lock(result)))), TABLE)
    assert run(given.model, recipe, given.task).digest == result.digest


@pytest.mark.parametrize("first", [Quantize(bits=4), Rdoq(bits=4.0), Prune(keep=0.5)], ids=lambda s: s.name)
def test_coded_leaves_are_coded_again_with_their_profile(first: object, tmp_path: Path) -> None:
    """A wide model that coders shorten: after the cut the same leaves are coded, by the same coder."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    task = type(cuttable("mlp").task)(evaluate=[(x, torch.zeros(32, dtype=torch.int64))])
    given = run(model, [first, Entropy(coder="fast", where="0.weight"), Entropy(where="2.weight")], task)
    kept = tuple(range(0, 96, 2))

    class Half(Halving):
        name = "half"

        def run(self, view):  # type: ignore[no-untyped-def]
            cuts = [Cut("0.weight", 0, kept), Cut("0.bias", 0, kept), Cut("2.weight", 1, kept, reads=True)]
            yield Group("half", cuts)

    result = run(given, Half(), task)
    for site in ("0.weight", "2.weight"):
        was, now = (
            {path: node.coder for path, node in state.forms[site].walk() if isinstance(node, Coded)}
            for state in (given, result)
        )
        assert now == was != {}
        axis = 0 if site == "0.weight" else 1
        want = uncoded(given.forms[site]).decode().index_select(axis, torch.tensor(kept))
        assert torch.equal(result.forms[site].decode(), want)
        assert result.forms[site].nbytes < 0.65 * given.forms[site].nbytes
    assert [entry.how for entry in result.ledger.entries if entry.step == 3 and entry.changes][-2:] == [
        "lossless"
    ] * 2


# --- proofs that fail ---


def halved(model: str, *events: object, proof: str = "") -> Halving:
    class Wrong(Halving):
        name = "wrong"

        def run(self, view):  # type: ignore[no-untyped-def]
            yield Group("wrong", tuple(e(view) if callable(e) else e for e in events), proof)  # type: ignore[misc]

    return Wrong(model)


LAST6 = tuple(range(6))
WRONG = {
    "another unit is read than the one that is made": [
        Cut("layers.0.weight", 0, LAST6), Cut("layers.0.bias", 0, LAST6),
        Cut("layers.2.weight", 1, (1, 2, 3, 4, 5, 6), reads=True),
    ],
    "a reader is forgotten": [Cut("layers.0.weight", 0, LAST6), Cut("layers.0.bias", 0, LAST6)],
    "a bias is forgotten": [Cut("layers.0.weight", 0, LAST6), Cut("layers.2.weight", 1, LAST6, reads=True)],
    "units change places and their readers do not": [
        Cut("layers.0.weight", 0, (1, 0, 2, 3, 4, 5, 6)), Cut("layers.0.bias", 0, (1, 0, 2, 3, 4, 5, 6)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_group_is_undone_as_a_whole(what: str) -> None:
    given = cuttable("mlp")
    result = run(given.model, halved("mlp", *WRONG[what]), given.task)
    assert result.digest == result.ledger.base
    assert notes(result, "refused") == ["wrong"]
    assert "not kept" in next(result.ledger.notes("refused")).text


def test_a_reordering_is_a_cut_and_is_proved() -> None:
    given, order = cuttable("mlp"), (3, 1, 6, 0, 2, 5, 4)
    events = [
        Cut("layers.0.weight", 0, order),
        Cut("layers.0.bias", 0, order),
        Cut("layers.2.weight", 1, order),
    ]
    result = run(given.model, halved("mlp", *events), given.task)
    assert notes(result, "proved") == ["wrong"]
    assert result.present("layers.2.weight", 1) == order
    torch.testing.assert_close(given.out(result.model()), given.out())


def test_without_a_task_nothing_is_proved_and_nothing_cut() -> None:
    given = cuttable("mlp")
    result = run(given.model, Halving("mlp"))
    assert result.digest == result.ledger.base
    assert all("there is no task" in entry.text for entry in result.ledger.notes("refused"))


def dead(unit: int) -> Tiny:
    """A model in which nothing reads one of the hidden units."""
    given = cuttable("mlp")
    with torch.no_grad():
        given.model.get_parameter("layers.2.weight")[:, unit] = 0
    return given


def test_a_unit_that_moves_nothing_is_proved_on_weights_moved_at_random() -> None:
    given = dead(-1)
    result = run(given.model, Halving("mlp"), given.task)
    assert notes(result, "proved") == ["first", "last"]


def test_a_wrong_pairing_with_a_dead_unit_is_found() -> None:
    """Unit 5 is read in place of 6, and neither changes an output now; with live units the group is wrong."""
    given = dead(-1)
    with torch.no_grad():
        given.model.get_parameter("layers.2.weight")[:, 5] = 0
    events = (
        Cut("layers.0.weight", 0, LAST6), Cut("layers.0.bias", 0, LAST6),
        Cut("layers.2.weight", 1, (0, 1, 2, 3, 4, 6), reads=True),
    )  # fmt: skip
    result = run(given.model, halved("mlp", *events, proof="masked"), given.task)
    assert notes(result, "refused") == ["wrong"]
    assert not result.kept  # the zeros of its dead units are under a mask


def test_if_no_unit_can_change_the_outputs_the_proof_is_void_and_the_cut_undone() -> None:
    """The outputs do not depend on the model's second half at all."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.own = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(x) + 0 * self.second(self.first(x))

    kept = (0, 1, 2)
    cuts = [
        Cut("first.weight", 0, kept),
        Cut("first.bias", 0, kept),
        Cut("second.weight", 1, kept, reads=True),
    ]
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    task = type(cuttable("mlp").task)(evaluate=[(x, torch.zeros(16, dtype=torch.int64))])
    result = run(Idle(), halved("mlp", *cuts, proof="masked"), task)
    assert notes(result, "void") == ["wrong"]
    assert "not kept" in next(result.ledger.notes("void")).text
    assert result.digest == result.ledger.base


class Filled(nn.Module):
    """Outputs with one column that is a huge constant, and a second output of another size."""

    def __init__(self, fill: float, large: float) -> None:
        super().__init__()
        self.first, self.second, self.fill, self.large = nn.Linear(4, 6), nn.Linear(6, 3), fill, large

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.second(self.first(x).relu())
        return [self.large * x.sum(1), torch.cat([y, torch.full_like(y[:, :1], self.fill)], 1)]


@pytest.mark.parametrize(("fill", "large"), [(-1e9, 1.0), (torch.finfo().min, 1.0), (0.0, 1e9), (1e9, 1e12)])
def test_large_outputs_do_not_hide_a_wrong_cut_in_others(fill: float, large: float) -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    task = type(cuttable("mlp").task)(
        evaluate=[(x, torch.zeros(16, dtype=torch.int64))],
        loss=lambda out, y: out[1][:, :3].sum(), metric=lambda out, y: out[1][:, 0],
    )  # fmt: skip
    kept, wrong = (0, 1, 2, 3, 4), (0, 1, 2, 3, 5)
    for read, kind in ((kept, "proved"), (wrong, "refused")):
        cuts = [
            Cut("first.weight", 0, kept),
            Cut("first.bias", 0, kept),
            Cut("second.weight", 1, read, reads=True),
        ]
        result = run(Filled(fill, large), halved("mlp", *cuts, proof="masked"), task)
        assert notes(result, kind) == ["wrong"], [e.text for e in result.ledger.notes()]


@pytest.mark.parametrize(
    "cut", [lambda: Cut("a", 0, [1, 0]), lambda: Cut("a", True, (0,)), lambda: Cut("a", 0, (True,))]
)
def test_a_cut_is_checked_where_it_is_made(cut: Callable[[], Cut]) -> None:
    """An event with a list of indices would differ from the event that a journal gives back."""
    try:
        made = cut()
    except TersorError:
        return
    assert isinstance(made.kept, tuple)
    assert all(type(index) is int for index in made.kept)
    assert type(made.axis) is int


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (Cut("layers.0.weight", 0, (0, 7)), "keeps index 7, which is not present"),
        (Cut("layers.0.weight", 0, (0, 0)), "keeps no index, or one twice"),
        (Cut("layers.0.weight", 0, ()), "keeps no index, or one twice"),
        (Cut("layers.0.weight", 2, (0,)), "axis 2 of 2 cannot be cut"),
        (Cut("nowhere", 0, (0,)), "no such weight to cut"),
    ],
)
def test_wrong_cuts_are_refused(cut: Cut, says: str) -> None:
    with pytest.raises(Exception, match=says):
        run(cuttable("mlp").model, halved("mlp", cut), cuttable("mlp").task)
