"""Quantize with rounding=auto: the first way within the limit is taken, and what is said of it."""

from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError
from tersor.model.task import Task
from tersor.steps import Quantize
from tersor.steps.rounding_search import WAYS

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches(count: int, seed: int) -> Batches:
    """Inputs that correlate, so that rounding to the nearest is not the best."""
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    x = x + 0.8 * x.roll(1, 1) + 0.4
    return [(x[i : i + 100], x[i : i + 100, :4].argmax(1)) for i in range(0, count, 100)]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    """A classifier of the largest of four inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(6):
            for x, y in batches(3000, 3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    return model.eval(), Task("largest", evaluate=batches(1000, 1), calibrate=batches(4000, 2))


def said(result: State, kind: str) -> Any:
    (note,) = result.ledger.notes(kind)
    return note


def drops_by_hand(model: nn.Module, task: Task, **settings: Any) -> dict[str, float]:
    """The drop in points of each way on every second calibration batch, with statistics from the others."""
    even, odd = task.calibrate[0::2], task.calibrate[1::2]
    on = Task("hand", evaluate=odd, calibrate=even)
    before = on.scores(model).mean()
    return {
        word: 100
        * float(before - on.scores(run(model, Quantize(rounding=word, **settings), on).model()).mean())
        for word in WAYS
    }


@pytest.mark.sampled(activations=0)
@pytest.mark.parametrize("activations", [0, 8])
def test_the_first_way_within_the_limit_is_taken(trained: tuple[nn.Module, Task], activations: int) -> None:
    """With a limit between the drops of the nearest and gptq; and the forms are those of gptq alone."""
    model, task = trained
    settings = {"bits": 2, "activations": activations}
    drops = drops_by_hand(model, task, **settings)
    assert drops["nearest"] > drops["gptq"] + 2.5, "else this would show nothing"
    limit = (drops["nearest"] + drops["gptq"]) / 2
    result = run(model, Quantize(rounding="auto", max_drop=limit, **settings), task)
    note = said(result, "rounding")
    assert note.data["rounding"] == "gptq"
    assert list(note.data["drops"]) == ["nearest", "gptq"]
    for word, (amount, low, high) in note.data["drops"].items():
        assert amount == pytest.approx(drops[word], abs=1e-3)
        assert low <= amount <= high
        assert (high <= limit) == (word == "gptq")
    assert note.text.startswith(
        "rounding=gptq: the first way in order of cost whose drop ends within max_drop="
    )
    assert note.text.endswith("; not tried: adaround, brecq")
    half = Task("hand", evaluate=task.evaluate, calibrate=task.calibrate[0::2])
    alone = run(model, Quantize(rounding="gptq", **settings), half)
    assert {n: f.digest for n, f in result.forms.items()} == {n: f.digest for n, f in alone.forms.items()}
    assert result.grids.keys() == alone.grids.keys()
    judged = said(result, "decided").data["judged"]
    fall = task.scores(model).mean() - task.scores(alone.model()).mean()
    assert judged["drop"][0] == pytest.approx(100 * float(fall), abs=1e-3)


def test_a_limit_that_the_nearest_meets_ends_the_search_there(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    result = run(model, Quantize(bits=4, rounding="auto", max_drop=60.0), task)
    assert said(result, "rounding").data["rounding"] == "nearest"
    assert said(result, "rounding").text.endswith("not tried: gptq, adaround, brecq")
    plain = run(model, Quantize(bits=4), task)
    assert {n: f.digest for n, f in result.forms.items()} == {n: f.digest for n, f in plain.forms.items()}
    assert not list(result.ledger.notes("advice")), "it was good enough"
    assert not list(result.ledger.notes("compensated"))


@pytest.mark.wide
def test_a_limit_that_no_way_meets_is_refused_with_the_drop_of_each(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    found = (
        r"no rounding to 2 bits .* on 2000 calibration samples: nearest loses \+.*, gptq loses .*, adaround "
    )
    with pytest.raises(RefusedError, match=found):
        run(model, Quantize(bits=2, rounding="auto", max_drop=0.3, per="tensor"), task)


def test_a_resumed_run_gives_the_same(trained: tuple[nn.Module, Task], tmp_path: Any) -> None:
    model, task = trained
    step = Quantize(bits=3, rounding="auto", max_drop=20.0, activations=8)
    whole = run(model, step, task)
    first = run(model, step, task, journal=tmp_path / "j")
    lines = (tmp_path / "j").rglob("*.jsonl")
    assert first.digest == whole.digest
    for path in lines:
        if "trial" not in str(path):
            text = path.read_text().splitlines(keepends=True)
            path.write_text("".join(text[: max(1, len(text) // 2)]))  # killed inside the step
    again = run(model, step, task, journal=tmp_path / "j", resume=True)
    assert again.digest == whole.digest


def test_only_the_evaluation_set_is_no_set_to_search_on(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    with pytest.raises(RefusedError, match="has no others"):
        run(model, Quantize(bits=4, rounding="auto", max_drop=1.0), Task("t", evaluate=task.evaluate))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rounding": "auto"}, "rounding='auto' needs max_drop"),
        ({"max_drop": 1.0}, "It needs allowed or rounding=auto"),
        ({"rounding": "gptq", "max_drop": 1.0}, "It needs allowed or rounding=auto"),
        ({"rounding": "auto", "max_drop": -1.0}, "above 0"),
        ({"rounding": "auto", "max_drop": 1.0, "epochs": 1.0}, "rounding"),
        ({"rounding": "auto", "max_drop": 1.0, "range": "output"}, "rounding=gptq, adaround and brecq alone"),
        ({"rounding": "auto", "max_drop": 1.0, "damp": 0.1}, "damp"),
        ({"rounding": "auto", "max_drop": 1.0, "allowed": "2,4"}, "allowed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Quantize(**settings)
