"""Training loop: schedules, losses and seeds agree with formulas; nothing outside it changes."""

import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BATCH, TRAIN, Tiny, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.run import run
from tersor.core.state import start
from tersor.errors import MissingError, RefusedError, TaskError, TersorError
from tersor.model import training_loop as module
from tersor.model.losses import soften
from tersor.model.task import Task
from tersor.model.trainable_forms import TrainableForms
from tersor.model.training_loop import OPTIMIZERS, SCHEDULES, TrainingPlan, fit, rate
from tersor.record.observer import Observer
from tersor.steps import Finetune, Quantize

STEPS = TRAIN // BATCH


def tuned_of(t: Tiny, model: nn.Module | None = None) -> TrainableForms:
    given = start(t.model if model is None else model)
    learn = [name for name, site in given.sites.items() if site.is_parameter]
    return TrainableForms(t.model if model is None else model, given.forms, given.sites, learn)


def digests(tuned: TrainableForms) -> dict[str, str]:
    return {name: form.digest for name, form in tuned.fold().items()}


# --- schedules ---

# schedule -> factor of the rate at 0, 1/8, 1/4, 1/2, 3/4, 1 of the training
RATES: dict[str, tuple[float, ...]] = {
    "constant": (1, 1, 1, 1, 1, 1),
    "linear": (1, 7 / 8, 3 / 4, 1 / 2, 1 / 4, 0),
    "cosine": (1, 0.5 + 0.5 * math.cos(math.pi / 8), 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0),
    "step": (1, 1, 1, 0.1, 0.01, 0.01),
    "onecycle": (0, 0.5, 1, 0.75, 0.25, 0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_agree_with_their_formulas(schedule: str) -> None:
    """A new schedule needs a row in RATES."""
    for eighths, want in zip((0, 1, 2, 4, 6, 8), RATES[schedule], strict=True):
        assert rate(eighths, 8, schedule) == pytest.approx(want, abs=1e-12)


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.data())
def test_factors_are_between_0_and_1(schedule: str, total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total))
    assert 0 <= rate(step, total, schedule) <= 1
    if schedule != "onecycle" and step < total:
        assert rate(step + 1, total, schedule) <= rate(step, total, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_optimizer_uses_the_rate_of_the_schedule(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(module, "make_optimizer", lambda groups, plan: Spy(groups, lr=plan.lr))
    t = tiny("mlp")
    fit(tuned_of(t), t.task, TrainingPlan(4, 0.1, schedule), seed=0)
    total = 4 * STEPS
    assert seen == pytest.approx([0.1 * max(rate(s, total, schedule), 1e-4) for s in range(total)])


# --- the loss ---


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.floats(0.5, 8), st.integers(0, 99))
def test_soft_targets_agree_with_a_slow_loop(
    batch: int, classes: int, length: int, t: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, classes, *([length] if length else []))
    output, wanted = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    total, count = 0.0, 0
    for b in range(batch):
        for at in range(max(length, 1)):
            s = [float(output[b, k, at] if length else output[b, k]) / t for k in range(classes)]
            w = [float(wanted[b, k, at] if length else wanted[b, k]) / t for k in range(classes)]
            p, q = ([math.exp(x - max(v)) for x in v] for v in (w, s))
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            count += 1
    assert float(soften(output, wanted, t)) == pytest.approx(t * t * total / count, rel=1e-3, abs=1e-4)


def one_loss(t: Tiny, plan: TrainingPlan, teacher: nn.Module | None = None) -> float:
    """The loss of one step on one batch."""
    x, y = next(iter(t.task.batches("calibrate")))
    task = replace(t.task, train=[(x, y)])
    facts = fit(tuned_of(t), task, plan, seed=0, teacher=teacher)
    assert facts["steps"] == 1
    return facts["loss"]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_mixes_labels_and_teacher(share: float) -> None:
    t, teacher = tiny("mlp"), tiny("mlp", seed=3).model
    x, y = next(iter(t.task.batches("calibrate")))
    with torch.no_grad():
        mine, theirs = t.model(x), teacher(x)
    want = (1 - share) * cross_entropy(mine, y) + share * soften(mine, theirs, 2.0)
    assert one_loss(t, TrainingPlan(teacher_weight=share, temperature=2.0), teacher) == pytest.approx(
        float(want), rel=1e-5
    )


def test_teacher_weight_0_ignores_the_teacher() -> None:
    t, teacher = tiny("mlp"), tiny("mlp", seed=3).model
    assert one_loss(t, TrainingPlan(), teacher) == one_loss(t, TrainingPlan())


def test_features_are_matched_by_mean_square() -> None:
    t, teacher = tiny("mlp"), tiny("mlp", seed=3).model
    x, y = next(iter(t.task.batches("calibrate")))
    with torch.no_grad():
        pairs = [[m.layers[:k](x) for m in (t.model, teacher)] for k in (1, 4)]
        want = cross_entropy(t.model(x), y) + 0.5 * sum((a - b).square().mean() for a, b in pairs)
    plan = TrainingPlan(features="layers.0, layers.3", feature_weight=0.5)
    assert one_loss(t, plan, teacher) == pytest.approx(float(want), rel=1e-5)


def test_a_layer_that_runs_twice_is_matched_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.inner(x)))

    t = replace(tiny("mlp"), model=Twice())
    teacher = Twice()
    x, y = next(iter(t.task.batches("calibrate")))
    with torch.no_grad():
        want = cross_entropy(t.model(x), y)
        a, b = t.model.inner(x), teacher.inner(x)
        want = want + (a - b).square().mean() + (t.model.inner(a) - teacher.inner(b)).square().mean()
    assert one_loss(t, TrainingPlan(features="inner"), teacher) == pytest.approx(float(want), rel=1e-5)


def test_a_layer_with_several_outputs_is_matched_by_its_first() -> None:
    t, teacher = tiny("lstm"), tiny("lstm", seed=3).model
    x, y = next(iter(t.task.batches("calibrate")))
    with torch.no_grad():
        want = cross_entropy(t.model(x), y) + (t.model.cell(x)[0] - teacher.cell(x)[0]).square().mean()
    assert one_loss(t, TrainingPlan(features="cell"), teacher) == pytest.approx(float(want), rel=1e-5)


def test_a_layer_that_never_runs_is_refused() -> None:
    t, teacher = tiny("attention"), tiny("attention", seed=3).model
    with pytest.raises(RefusedError, match=r"features: multi\.out_proj exists, but .* does not call it"):
        one_loss(t, TrainingPlan(features="multi.out_proj"), teacher)


# --- the loop ---


@pytest.mark.parametrize("epochs", [0.5, 1, 1.5, 3, 0.01])
def test_epochs_are_passes_over_the_training_set(epochs: float) -> None:
    t, seen = tiny("mlp"), []
    facts = fit(
        tuned_of(t),
        t.task,
        TrainingPlan(epochs),
        seed=0,
        on_step=lambda step, total: seen.append((step, total)),
    )
    total = max(1, round(epochs * STEPS))
    assert facts["steps"] == total
    assert seen == [(step, total) for step in range(total)]


def sources(t: Tiny) -> dict[str, Any]:
    x, y = (torch.cat(part) for part in zip(*t.task.batches("calibrate"), strict=True))
    pieces = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, TRAIN, BATCH)]
    return {
        "list": pieces,
        "function": lambda: iter(pieces),
        "generator function": lambda: (piece for piece in pieces),
        "loader": DataLoader(TensorDataset(x, y), batch_size=BATCH),
        "dicts": [{"x": a, "labels": b} for a, b in pieces],
    }


@pytest.mark.parametrize("name", ["list", "function", "generator function", "loader"])
def test_every_kind_of_training_set_trains_the_same(name: str) -> None:
    t = tiny("mlp")
    want, found = tuned_of(t), tuned_of(t)
    fit(want, replace(t.task, train=sources(t)["list"]), TrainingPlan(2, 0.01), seed=1)
    facts = fit(found, replace(t.task, train=sources(t)[name]), TrainingPlan(2, 0.01), seed=1)
    assert facts["steps"] == 2 * STEPS
    assert digests(found) == digests(want) != digests(tuned_of(t))


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    t, found = tiny("conv"), []
    for seed in (4, 4, 5):
        random.seed(seed * 3)
        torch.manual_seed(len(found))
        tuned = tuned_of(t)
        facts = fit(tuned, t.task, TrainingPlan(2, 0.01), seed=seed)
        found.append((digests(tuned), facts))
    assert found[0] == found[1] != found[2]


@pytest.mark.sampled
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "attention", "lstm"])
def test_training_lowers_the_loss(optimizer: str, name: str) -> None:
    t = tiny(name)
    first = one_loss(t, TrainingPlan())
    lr = 0.02 if optimizer != "sgd" or name == "attention" else 0.2
    plan = TrainingPlan(30, lr, optimizer=optimizer)
    assert fit(tuned_of(t), t.task, plan, seed=0)["loss"] < 0.85 * first


def test_weights_decay_and_biases_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    make = module.make_optimizer
    monkeypatch.setattr(module, "make_optimizer", lambda g, plan: groups.extend(g) or make(g, plan))
    t = tiny("conv")
    fit(tuned_of(t), t.task, TrainingPlan(0.1, weight_decay=0.3), seed=0)
    decays = [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups]
    assert decays == [(0.3, {2, 4}), (0.0, {1})]


def test_a_model_with_vectors_only_is_trained() -> None:
    """Also with weight decay, which then applies to no parameter."""
    t, model = tiny("mlp"), nn.BatchNorm1d(5)
    tuned, before = tuned_of(t, model), model.state_dict()
    assert fit(tuned, t.task, TrainingPlan(1, 0.1, weight_decay=0.3), seed=0)["steps"] == STEPS
    assert all(not torch.equal(form.decode(), before[name]) for name, form in tuned.fold().items())


def test_progress_is_reported() -> None:
    t, told = tiny("mlp"), []
    fit(tuned_of(t), t.task, TrainingPlan(11), seed=0, watch=lambda *facts: told.append(facts))
    assert [(done, total) for done, total, _ in told] == [(10, 22), (20, 22), (22, 22)]
    assert all(text.startswith("loss ") for _, _, text in told)


def test_half_precision_passes_keep_float32_weights() -> None:
    t = tiny("mlp")
    found = []
    for bf16 in (False, True):
        tuned = tuned_of(t)
        fit(tuned, t.task, TrainingPlan(4, 0.01, bf16=bf16), seed=0)
        assert all(form.decode().dtype is torch.float32 for form in tuned.fold().values())
        found.append(torch.cat([form.decode().flatten() for form in tuned.fold().values()]))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, atol=0.02, rtol=0.05)


# --- errors ---


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    t, seen = tiny("mlp"), []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(1)
        return cross_entropy(output, target) * (math.inf if len(seen) == 3 else 1)

    with pytest.raises(RefusedError, match=r"the loss is nan after 4 of 20 steps\. Lower lr=0\.01\."):
        fit(tuned_of(t), replace(t.task, loss=loss), TrainingPlan(10, 0.01), seed=0)


def test_no_training_set() -> None:
    t = tiny("mlp")
    with pytest.raises(TaskError, match="this needs train batches, and the task has none"):
        fit(tuned_of(t), Task(evaluate=t.task.evaluate), TrainingPlan(), seed=0)


def test_a_training_set_without_a_second_pass() -> None:
    t = tiny("mlp")
    once = iter(sources(t)["list"])
    with pytest.raises(TaskError, match="train set is empty"):
        fit(tuned_of(t), replace(t.task, train=lambda: once), TrainingPlan(3), seed=0)


def test_batches_that_do_not_fit_are_refused() -> None:
    t = tiny("mlp")
    bad = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(
        TersorError, match=r"a batch, \(float32 \[8, 4\], int64 \[8\]\), does not fit the model"
    ):
        fit(tuned_of(t), replace(t.task, train=bad), TrainingPlan(), seed=0)


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    t = tiny("mlp")
    with pytest.raises(MissingError, match=r"training needs the package accelerate.*tersor\[train\]"):
        fit(tuned_of(t), t.task, TrainingPlan(), seed=0)


# --- nothing else changes ---


def state_of_the_world() -> dict[str, Any]:
    kind, words, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [kind, words.tolist(), rest],
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
    }


@pytest.mark.parametrize("grad", [True, False])
def test_global_state_is_restored(grad: bool) -> None:
    t, teacher = tiny("conv"), tiny("conv", seed=3).model
    weights = {key: value.clone() for key, value in teacher.state_dict().items()}
    plan = TrainingPlan(1, teacher_weight=0.5, features="block", bf16=True)
    with torch.set_grad_enabled(grad):
        before = state_of_the_world()
        fit(tuned_of(t), t.task, plan, seed=0, teacher=teacher)
        assert state_of_the_world() == before
    assert all(torch.equal(value, weights[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    for model in (teacher, t.model):
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def failing(count: int) -> Callable[[int, int], None]:
    def on_step(step: int, total: int) -> None:
        if step == count:
            raise KeyboardInterrupt

    return on_step


def test_global_state_is_restored_after_ctrl_c() -> None:
    t, teacher = tiny("conv"), tiny("conv", seed=3).model
    before = state_of_the_world()
    plan = TrainingPlan(2, teacher_weight=0.5, features="block")
    with pytest.raises(KeyboardInterrupt):
        fit(tuned_of(t), t.task, plan, seed=0, teacher=teacher, on_step=failing(3))
    assert state_of_the_world() == before
    assert not any(m._forward_hooks for m in teacher.modules())


def test_a_loaders_own_generator_starts_from_the_seed_and_is_restored() -> None:
    t = tiny("mlp")
    x, y = (torch.cat(part) for part in zip(*t.task.batches("calibrate"), strict=True))
    generator = torch.Generator().manual_seed(9)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator)
    before, found = generator.get_state(), []
    for _ in range(2):
        tuned = tuned_of(t)
        fit(tuned, replace(t.task, train=loader), TrainingPlan(2, 0.01), seed=3)
        found.append(digests(tuned))
        assert torch.equal(generator.get_state(), before)
        assert loader.sampler.generator is generator
    assert found[0] == found[1]
    generator.manual_seed(10)
    again = tuned_of(t)
    fit(again, replace(t.task, train=loader), TrainingPlan(2, 0.01), seed=3)
    assert digests(again) == found[0]


def test_the_trained_model_is_left_in_eval_mode() -> None:
    t = tiny("conv")
    tuned = tuned_of(t)
    fit(tuned, t.task, TrainingPlan(), seed=0)
    assert not any(m.training for m in (*tuned.modules(), *tuned.net.modules()))


TRAINED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from tiny import tiny
from tersor.core.run import run
from tersor.steps import Finetune
if "first" in sys.argv:  # what a trainer of the user's has left in this process
    from accelerate import Accelerator
    Accelerator(cpu=True, mixed_precision="bf16")
t = tiny("mlp")
print(run(t.model, Finetune(epochs=1, lr=0.5, optimizer="sgd"), t.task).digest)
"""


@pytest.fixture(scope="module")
def plainly_trained() -> str:
    return trained_elsewhere({})


def trained_elsewhere(settings: dict[str, str], *words: str) -> str:
    """The digest of a training in a process of its own: Accelerate's state is one for each process."""
    words = ("-c", TRAINED, str(Path(__file__).resolve().parents[1]), *words)
    return str(forks.run(words, env=os.environ | settings, check=True).stdout)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ()), ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ()),
     ({}, ("first",))],
    ids=["accumulation", "precision", "another Accelerator"],
)  # fmt: skip
def test_the_environment_does_not_change_the_training(
    settings: dict[str, str], words: tuple[str, ...], plainly_trained: str
) -> None:
    """What a recipe says is what runs, whatever Accelerate's launcher or configuration sets."""
    assert trained_elsewhere(settings, *words) == plainly_trained


def test_a_missing_package_is_reported_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    t, seen = tiny("mlp"), []

    class Seen(Observer):
        def step(self, number: int, total: int, name: str) -> None:
            seen.append(name)

    with pytest.raises(MissingError, match=r"training needs the package accelerate\..*tersor\[train\]"):
        run(t.model, [Quantize(), Finetune(epochs=1)], t.task, observer=Seen())
    assert seen == []
    run(t.model, [Quantize()], t.task)
