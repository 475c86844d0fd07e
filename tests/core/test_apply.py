"""Apply: cuts name given indices regardless of earlier cuts; removed sites leave nothing behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.state import State, start
from tersor.errors import RefusedError
from tersor.forms import Dense, Grid, LowRank
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.changes import Replace, Set
from tersor.record.events import Cut, Edit, Event, Group


def after(state: State, *events: Event) -> State:
    return apply(state, Group("group", events), "test")[0]


def given(seed: int = 0) -> State:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return start(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)))


def test_a_cut_names_given_indices_after_a_reordering_and_a_cut() -> None:
    state = given()
    w = state.forms["0.weight"].decode()
    for kept in ((4, 2, 0, 5, 1, 3), (5, 2, 3, 0), (0, 5)):
        state = after(state, Cut("0.weight", 0, kept))
        assert state.present("0.weight", 0) == kept
        assert torch.equal(state.forms["0.weight"].decode(), w[list(kept)])
    with pytest.raises(RefusedError, match="keeps index 2, which is not present"):
        after(state, Cut("0.weight", 0, (2,)))


def test_cuts_along_two_axes_commute() -> None:
    state, rows, columns = given(), Cut("0.weight", 0, (5, 1)), Cut("0.weight", 1, (0, 4, 2))
    one, other = after(after(state, rows), columns), after(after(state, columns), rows)
    assert one.digest == other.digest
    want = state.forms["0.weight"].decode()[[5, 1]][:, [0, 4, 2]]
    assert torch.equal(one.forms["0.weight"].decode(), want)


def test_removed_sites_leave_no_cuts(tmp_path: Path) -> None:
    state = after(given(), Cut("0.weight", 0, (0, 1)), Cut("0.bias", 0, (0, 1)), Cut("2.weight", 1, (0, 1)))
    factors = LowRank(Dense(torch.ones(2, 1)), Dense(torch.ones(1, 5)))
    state = after(state, Edit("0.weight", state.forms["0.weight"], factors, "absorb"))
    state = after(state, Replace("0", "product", {"layers": 2}))
    assert "0.weight" not in state.sites
    assert set(state.kept) <= set(state.sites)
    assert "2.weight" in state.kept
    save(state, tmp_path / "m.tersor")
    assert load(tmp_path / "m.tersor").digest == state.digest


def test_new_sites_have_an_origin() -> None:
    state = after(given(), Replace("2", "identity"))
    assert list(state.sites) == ["0.weight", "0.bias"]
    bare = start(nn.Sequential(nn.Linear(5, 6, bias=False)))
    assert after(bare, Replace("0", "bias")).sites["0.bias"].origin == "0.bias zeros"
    assert not any(site.origin for site in bare.sites.values())


def grid(scale: float) -> Grid:
    return Grid(Dense(torch.tensor([[scale]])), Dense(torch.zeros(1, 1, dtype=torch.int16)), 8, False, 1)


def test_a_grid_is_changed_only_from_the_current_one() -> None:
    state = after(given(), Edit("0/linear", None, grid(1.0), "wrap"))
    assert (
        after(state, Edit("0/linear", grid(1.0), grid(2.0), "wrap")).grids["0/linear"].digest
        == grid(2.0).digest
    )
    for before in (None, grid(3.0)):
        with pytest.raises(RefusedError, match="starts from another grid"):
            after(state, Edit("0/linear", before, grid(2.0), "wrap"))


@pytest.mark.parametrize(
    "event", [Set("0", "in_features", 5), Replace("1", "identity")], ids=["set", "replace"]
)
def test_a_change_of_a_module_makes_grids_stale(event: Any) -> None:
    state = after(given(), Edit("0/linear", None, grid(1.0), "wrap"))
    assert not state.grids["0/linear"].stale
    assert after(state, event).grids["0/linear"].stale


def test_a_dynamic_grid_is_never_stale_and_goes_with_its_layer() -> None:
    state = after(given(), Edit("0/linear:0<0", None, Grid(), "refine"))
    weight = Edit("0.weight", state.forms["0.weight"], Dense(torch.ones(6, 5)), "refine")
    for event in (weight, Set("0", "in_features", 5), Replace("1", "identity"), Replace("2", "scaled")):
        assert after(state, event).grids["0/linear:0<0"].digest == Grid().digest
    factors = LowRank(Dense(torch.ones(6, 1)), Dense(torch.ones(1, 5)))
    events = (
        Edit("0.weight", state.forms["0.weight"], factors, "absorb"),
        Replace("0", "product", {"layers": 2}),
    )
    assert not after(state, *events).grids
    static = after(given(), Edit("0/linear:0<0", None, grid(1.0), "refine"))
    assert after(static, *events).grids["0/linear:0<0"].stale


def test_the_digest_depends_on_every_part_of_a_state() -> None:
    state = given()
    parts: list[State] = [
        state,
        after(state, Set("0", "in_features", 5)),
        after(state, Replace("1", "identity")),
        after(state, Edit("0/linear", None, grid(1.0), "wrap")),
        after(state, Edit("0/linear", None, grid(1.0).replace(stale=True), "wrap")),
        after(state, Edit("2/linear", None, grid(1.0), "wrap")),
        replace(state, kept={"0.weight": {0: (0, 1, 2, 3, 5, 4)}}),
        replace(state, kept={"0.weight": {1: (0, 1, 2, 3, 4)}}),
    ]
    assert len({part.digest for part in parts}) == len(parts)
    assert given().digest == state.digest != given(1).digest
