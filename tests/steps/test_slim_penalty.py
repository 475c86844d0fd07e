"""Slim with a penalty: the units that go, and no others, shrink before the cut, which then changes little."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.run import run
from tersor.core.state import State, start
from tersor.errors import SettingError
from tersor.forms import Masked
from tersor.model.task import Task
from tersor.record.journal import lines_of
from tersor.steps import Prune, Slim


class Net(nn.Module):
    """A stream of 8 channels with a branch of 12; each unit has slices in several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 6, 6]
        x = F.relu(self.n0(self.stem(x)))
        x = x + self.b(F.relu(self.n1(self.a(x))))
        return self.head(x.mean((2, 3)))


def given() -> tuple[nn.Module, Task]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Net().eval(), torch.randn(64, 2, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    return model, Task("net", evaluate=batches, calibrate=batches, train=batches)


def before_the_cut(model: nn.Module, journal: Path) -> State:
    """The state that the cut began with, from the journal."""
    state = start(model)
    for line in lines_of(journal):
        if line.key == "cut 1":
            return state
        state = apply(state, line.group(), "test")[0]
    raise AssertionError("nothing was cut")


def slimmed(folder: Path, **settings: Any) -> tuple[nn.Module, Task, State, State]:
    model, task = given()
    settings = {
        "keep": 0.5,
        "by": "l2",
        "per": "family",
        "correct": False,
        "epochs": 10,
        "lr": 1e-3,
    } | settings
    result = run(model, Slim(**settings), task, journal=folder)
    return model, task, before_the_cut(model, folder), result


def outputs(model: nn.Module, task: Task) -> Tensor:
    model = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        return torch.cat([model(x.double()) for x, _ in task.batches("evaluate")])


# By hand: for each axis that is cut, every tensor in which its units have slices.
STREAM = {"stem.weight": 0, "stem.bias": 0, "n0.weight": 0, "n0.bias": 0, "a.weight": 1, "b.weight": 0,
          "b.bias": 0, "head.weight": 1}  # fmt: skip
INNER = {"a.weight": 0, "n1.weight": 0, "n1.bias": 0, "b.weight": 1}


def test_every_slice_of_the_units_that_go_shrinks_and_no_other(tmp_path: Path) -> None:
    model, task, pulled, result = slimmed(tmp_path, penalty=6.0, before=1.0)
    trained = slimmed(tmp_path / "none", penalty=1e-9, before=1.0)[2]  # the same training, without the pull
    now, was = pulled.state_dict(), trained.state_dict()
    shrinks = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in now.items()}
    for slices in (STREAM, INNER):
        name, axis = next(iter(slices.items()))
        lost = sorted(set(range(model.state_dict()[name].shape[axis])) - set(result.present(name, axis)))
        assert lost, "each family has to lose some"
        for each, along in slices.items():
            shrinks[each].index_fill_(along, torch.tensor(lost), True)
            assert result.present(each, along) == result.present(name, axis)
    for name, gone in shrinks.items():
        if now[name].is_floating_point() and "running" not in name and gone.any():
            assert now[name][gone].norm() < 0.05 * was[name][gone].norm().clamp_min(0.05), name
            if not gone.all() and now[name].ndim > 1:
                assert now[name][~gone].norm() > 0.5 * was[name][~gone].norm(), name
    (note,) = [entry.data for entry in result.ledger.entries if entry.kind == "shrunk"]
    parts = [now[name][gone] for name, gone in shrinks.items() if gone.any() and "running" not in name]
    assert note["norm_after"] == pytest.approx(float(torch.cat(parts).double().norm()), rel=1e-5)
    assert note["norm_after"] < 0.05 * note["norm_before"]


def test_the_cut_then_changes_little(tmp_path: Path) -> None:
    errors = {}
    for penalty in (1e-9, 8.0):
        _, task, pulled, result = slimmed(tmp_path / str(penalty), penalty=penalty, before=1.0)
        want = outputs(pulled.model(), task)
        errors[penalty] = float((outputs(result.model(), task) - want).norm() / want.norm())
    assert errors[8.0] < 0.02
    assert errors[8.0] < 0.1 * errors[1e-9], errors


def test_the_epochs_are_shared_between_both_trainings(tmp_path: Path) -> None:
    *_, result = slimmed(tmp_path, penalty=3.0, before=0.25, epochs=8)
    steps = {e.kind: e.data["steps"] for e in result.ledger.entries if e.kind in ("shrunk", "trained")}
    assert steps == {"shrunk": 2 * 4, "trained": 6 * 4}  # 4 batches a pass


def test_it_shrinks_under_a_mask_and_in_rounds(tmp_path: Path) -> None:
    model, task = given()
    step = Slim(keep=0.5, by="l2", penalty=5.0, epochs=4, rounds=2, lr=1e-3)
    result = run(model, [Prune(keep=0.6), step], task)
    assert isinstance(result.forms["a.weight"], Masked)
    notes = [entry.data for entry in result.ledger.entries if entry.kind == "shrunk"]
    assert len(notes) == 2
    assert all(note["norm_after"] < 0.2 * note["norm_before"] for note in notes)
    assert run(model, [Prune(keep=0.6), step], task).digest == result.digest


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"penalty": 1.0}, "epochs above 0"), ({"penalty": -1.0, "epochs": 1}, "exp"),
        ({"before": 0.2, "epochs": 1}, "penalty above 0"),
        ({"before": 0.0, "penalty": 1.0, "epochs": 1}, "share of the epochs"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Slim(**settings)
