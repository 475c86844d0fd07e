"""Proof: which structural groups are accepted, and how small an error is found."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import SettingError
from tersor.model.changes import Set
from tersor.model.task import Task
from tersor.record.events import Cut, Group


@dataclass(frozen=True)
class Does:
    """A step of this one group."""

    group: Group
    name: ClassVar[str] = "does"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.MODEL | Needs.TASK

    def run(self, view: View) -> Iterator[Group]:
        yield self.group


class Net(nn.Module):
    """Two layers, an integer that scales the outputs, and a dtype that forward may require."""

    def __init__(self, between: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.between, self.b = nn.Linear(5, 4), between or nn.ReLU(), nn.Linear(4, 3)
        self.times, self.dtype = 2, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x if self.dtype is None else x.to(self.dtype)))) / self.times


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
TASK = Task(evaluate=[(X, torch.zeros(8, dtype=torch.int64))])


def after(model: nn.Module, *events: Cut | Set, proof: str = "") -> tuple[State, str]:
    """(the model after the group, the note on the group)."""
    result = run(model, Does(Group("group", events, proof)), TASK)
    (note,) = result.ledger.notes()
    assert (note.kind == "refused") == (result.digest == result.ledger.base)
    assert note.kind != "refused" or "not kept" in note.text
    return result, note.kind


def unit(*kept: int) -> list[Cut]:
    """Cuts of the units between the two layers."""
    return [Cut("a.weight", 0, kept), Cut("a.bias", 0, kept), Cut("b.weight", 1, kept, reads=True)]


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.Sigmoid(), nn.Sequential(nn.Tanh(), nn.Sigmoid())], ids=str
)
def test_zeros_are_put_where_units_are_read(between: nn.Module) -> None:
    """A sigmoid turns a unit with zero weights into 0.5; zero columns in the reader ignore the unit."""
    model = Net(between)
    result, said = after(model, *unit(0, 2, 3))
    assert said == "proved"
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    torch.testing.assert_close(result.model()(X), model(X))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["in float64", "in the model's own dtype"])
@pytest.mark.parametrize("share", [1e-1, 1e-3])
def test_a_small_error_is_found(dtype: torch.dtype | None, share: float) -> None:
    """Two nearly equal units are swapped, and their readers are not."""
    model = Net(dtype=dtype)
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias):
            tensor[1] = tensor[0] * (1 + share)
    order = (1, 0, 2, 3)
    swapped = [Cut("a.weight", 0, order), Cut("a.bias", 0, order)]
    assert after(model, *swapped)[1] == "refused"
    assert after(model, *swapped, Cut("b.weight", 1, order))[1] == "proved"
    assert after(model, *unit(0, 2, 3))[1] == "proved"


def test_a_cut_of_the_outputs_is_undone() -> None:
    cuts = [Cut("b.weight", 0, (0, 1)), Cut("b.bias", 0, (0, 1))]
    assert after(Net(), *cuts)[1] == "refused"
    assert after(Net(), *cuts, proof="runs")[1] == "refused"


def test_an_integer_that_changes_outputs_is_undone_unless_intended() -> None:
    assert after(Net(), Set("", "times", 3))[1] == "refused"
    result, said = after(Net(), Set("", "times", 3), proof="runs")
    assert said == "proved"
    torch.testing.assert_close(result.model()(X), Net()(X) * 2 / 3)


def test_outputs_that_are_not_finite_are_always_undone() -> None:
    assert after(Net(), Set("", "times", 0), proof="runs")[1] == "refused"


def test_an_unknown_proof_is_refused() -> None:
    """A misspelt proof would check less than intended."""
    with pytest.raises(SettingError, match="masked"):
        Group("group", unit(0, 1, 2), proof="maskd")


class Avoided(nn.Module):
    """A layer whose error contains the word "void"."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("give 4 features to avoid this")
        return x


def test_an_error_with_the_word_void_is_an_error() -> None:
    assert after(Net(Avoided()), *unit(0, 1, 2))[1] == "refused"
