"""Document: a file's ledger is bounded in size; invalid cuts and grids are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import take_apart

from tersor.core.apply import apply
from tersor.core.history import undo
from tersor.core.state import State, start
from tersor.errors import FormatError, RefusedError
from tersor.forms import Dense, Grid
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.json_text import dump
from tersor.model.sites import Site
from tersor.record.events import Cut, Edit, Group, Note
from tersor.record.ledger import Ledger
from tersor.steps.recipe_text import lock


def state_of(steps: int, sites: int, text: str) -> State:
    """`steps` steps that each edited `sites` sites, with a note per edit."""
    names = [f"layers.{number}.weight" for number in range(sites)]
    forms = {name: Dense(torch.full((2,), float(number))) for number, name in enumerate(names)}
    recipe = {"tersor": 1, "seed": 0, "steps": [{"prune": {"keep": 0.5}}] * steps}
    ledger = Ledger("0" * 16, recipe)
    for step in range(steps):
        for name, form in forms.items():
            group = Group(name, (Edit(name, form, form, "refine"), Note(name, "done", text)))
            ledger.record(step, "prune", group, [(form.digest, form.digest), ("", "")])
    return State({name: Site(name, (2,), "float32", "other") for name in names}, dict(forms), {}, ledger)


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("sites", [1, 4, 30])
@pytest.mark.parametrize("text", ["kept 4 of 4", "w" * 1000], ids=["short", "long"])
def test_a_ledger_takes_4_kb_and_100_bytes_a_site_and_step(
    steps: int, sites: int, text: str, tmp_path: Path
) -> None:
    given = state_of(steps, sites, text)
    save(given, tmp_path / "m.tersor")
    document = take_apart((tmp_path / "m.tersor").read_bytes()).document
    history = {key: document[key] for key in ("past", "recipe", "ledger") if key in document}
    assert len(dump(history)) <= 4000 + 100 * sites * steps
    found = load(tmp_path / "m.tersor").ledger
    assert found.digest == given.ledger.digest
    assert found.count == steps
    assert found.step_names() == ["prune"] * steps
    assert {entry.step for entry in found.entries} == set(range(len(found.past), steps))
    short = [
        replace(e, text=e.text[:397] + "..." if len(e.text) > 400 else e.text) for e in given.ledger.entries
    ]
    assert found.entries == [entry for entry in short if entry.step >= len(found.past)]
    save(load(tmp_path / "m.tersor"), tmp_path / "again.tersor")
    assert (tmp_path / "again.tersor").read_bytes() == (tmp_path / "m.tersor").read_bytes()


def test_as_few_steps_as_necessary_become_a_line(tmp_path: Path) -> None:
    save(state_of(2, 4, "kept 4 of 4"), tmp_path / "small.tersor")
    assert load(tmp_path / "small.tersor").ledger.past == ()
    save(state_of(20, 4, "w" * 400), tmp_path / "large.tersor")
    large = load(tmp_path / "large.tersor")
    assert 0 < len(large.ledger.past) < 20
    with pytest.raises(RefusedError, match=f"names of the first {len(large.ledger.past)} steps"):
        undo(large, 19)
    with pytest.raises(RefusedError, match="lock: this ledger no longer has the settings"):
        lock(large)


# --- cuts and grids that cannot be ---


def test_a_sound_file_with_a_cut_and_a_grid_is_read(tmp_path: Path) -> None:
    assert load(saved(tmp_path)).digest == cut_and_gridded().digest


WRONG: dict[str, Callable[[Any], Any]] = {
    "an index too far": lambda d: d["indices"].__setitem__(0, [0, 2, 6, 1]),
    "an index twice": lambda d: d["indices"].__setitem__(0, [0, 2, 1, 1]),
    "another number of indices": lambda d: d["indices"].__setitem__(0, [0, 2]),
    "no indices": lambda d: d["indices"].__setitem__(0, []),
    "a list that is not there": lambda d: d["sites"]["0.weight"].update(kept={"0": 7}),
    "an axis that is not there": lambda d: d["sites"]["0.weight"].update(kept={"2": 0}),
    "a cut that the form does not have": lambda d: d["sites"]["0.weight"].pop("kept"),
    "a grid under a site's name": lambda d: d["grids"].update({"0.bias": d["grids"].pop("0/linear")}),
    "a form on an edge": lambda d: d["grids"]["0/linear"].update(
        form=d["grids"]["0/linear"]["form"]["scale"]
    ),
    "a grid of another digest": lambda d: d["grids"]["0/linear"].update(digest="0" * 16),
    "a grid of other bits": lambda d: d["grids"]["0/linear"]["form"].update(bits=7),
}


@pytest.mark.parametrize("what", WRONG)
def test_invalid_cuts_and_grids_are_refused(what: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    pieces = take_apart(path.read_bytes())
    WRONG[what](pieces.document)
    path.write_bytes(pieces.bytes())
    with pytest.raises(FormatError):
        load(path)


def cut_and_gridded() -> State:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = start(torch.nn.Sequential(torch.nn.Linear(5, 6)))
    grid = Grid(Dense(torch.ones(1)), Dense(torch.zeros(1, dtype=torch.int16)))
    events = Cut("0.weight", 0, (0, 1, 5)), Cut("0.bias", 0, (0, 1, 5)), Edit("0/linear", None, grid, "wrap")
    return apply(state, Group("all", events), "test")[0]


def saved(folder: Path) -> Path:
    save(cut_and_gridded(), folder / "m.tersor")
    return folder / "m.tersor"
