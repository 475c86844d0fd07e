"""A layer that is replaced by two: lock, file and sizes with removed and new sites."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from tersor.core.history import undo
from tersor.core.run import run
from tersor.core.state import State, start
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.verify import verify
from tersor.model.changes import Replace
from tersor.model.task import Task
from tersor.record.events import Group
from tersor.steps import Factorize, Measure
from tersor.steps.recipe_text import lock

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
TASK = Task(evaluate=[(X, torch.zeros(8, dtype=torch.int64))])


@dataclass(frozen=True)
class Parts:
    """The first layer as its two factors."""

    name: ClassVar[str] = "parts"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.MODEL | Needs.TASK

    def run(self, view: View) -> Iterator[Group]:
        yield Group("0", [Replace("0", "product", {"layers": 2})])


@pytest.fixture(scope="module")
def replaced() -> tuple[nn.Module, State]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, run(model, [Factorize(rank=2, where="0.weight"), Parts()], TASK)


def test_the_lock_names_new_sites(replaced: tuple[nn.Module, State]) -> None:
    model, result = replaced
    assert [entry.kind for entry in result.ledger.notes(first=-1)] == ["proved"]
    assert set(lock(result)["result"]) == {"0.0.weight", "0.1.weight", "0.1.bias"}
    assert undo(result).digest == start(model).digest


def test_the_file_is_sound_and_knows_the_given_model(
    replaced: tuple[nn.Module, State], tmp_path: Path
) -> None:
    model, result = replaced
    save(result, tmp_path / "m.tersor")
    assert all(check.sound for check in verify(tmp_path / "m.tersor"))
    found = load(tmp_path / "m.tersor")
    assert found.digest == result.digest
    assert torch.equal(found.model(model)(X), result.model()(X))


def test_given_bytes_are_reported_or_unknown(replaced: tuple[nn.Module, State], tmp_path: Path) -> None:
    """A file does not have the removed sites, so it does not know their bytes."""
    model, result = replaced
    given = sum(value.nbytes for value in model.state_dict().values())
    assert result.given_nbytes == given
    save(result, tmp_path / "m.tersor")
    save(run(model, Factorize(rank=1)), tmp_path / "whole.tersor")
    assert load(tmp_path / "whole.tersor").given_nbytes == given
    found = load(tmp_path / "m.tersor")
    assert found.given_nbytes is None
    (note,) = run(found, Measure()).ledger.notes("nbytes")
    assert note.data == {"after": result.nbytes}
    assert "the given bytes are unknown" in note.text
    (note,) = run(found.on(model), Measure(), TASK).ledger.notes("nbytes")
    assert note.data == {"before": given, "after": result.nbytes}
