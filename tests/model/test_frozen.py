"""Frozen tensors and modules stay equal bit for bit in every step that trains."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import resumed
from tiny import TRAINED, tiny
from torch import Tensor, nn

from tersor import Distill, Finetune, Prune, Quantize, SettingError, Task, load, run, save, trainable
from tersor.core.state import State
from tersor.model.frozen import frozen_in
from tersor.steps import STEPS, Slim
from tersor.steps.retrain import TRAINING


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.m = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.m(self.b(self.n(self.a(x)).relu())).relu()
        return self.head(self.drop(x.mean((2, 3))))


GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 1, 6, 6, generator=GENERATOR) + 2, torch.randint(0, 3, (32,), generator=GENERATOR)
TASK = Task(evaluate=[(X, Y)], train=[(X[:16], Y[:16]), (X[16:], Y[16:])], calibrate=[(X, Y)])
STATISTICS = ("n.running_mean", "n.running_var", "n.num_batches_tracked")


def net(*, frozen: bool = True) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
    if frozen:
        model.a.weight.requires_grad = False
        model.head.bias.requires_grad = False
        model.n.eval()
    return model


def same(state: State, model: nn.Module, *names: str) -> bool:
    now, was = state.state_dict(), model.state_dict()
    return all(torch.equal(now[name], was[name]) for name in names)


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in ("slim", "shorten")])  # below
def test_every_step_that_trains_keeps_frozen_tensors(name: str) -> None:
    """A step may compress a frozen weight by what it does without training."""
    model = net()
    settings = TRAINED[name] | {"epochs": 3, "lr": 0.1, "weight_decay": 0.5}
    settings |= {"arrange": False} if name == "penalize" else {}
    result = run(model, STEPS[name](**settings), TASK)
    free = run(model, STEPS[name](**settings, frozen="train"), TASK)
    assert same(result, model, *STATISTICS)
    assert not same(free, model, "n.running_mean")
    if name != "penalize":  # penalize stores biases on a grid
        assert same(result, model, "head.bias")
        assert not same(free, model, "head.bias")
    bare = {key: value for key, value in TRAINED[name].items() if key != "epochs" and key not in TRAINING}
    if name in ("finetune", "distill"):
        assert same(result, model, "a.weight")
    elif name in ("quantize", "cluster", "factorize"):
        stored = run(model, STEPS[name](**bare), TASK).forms["a.weight"]
        assert result.forms["a.weight"].digest == stored.digest
    elif name == "prune":
        now = result.state_dict()["a.weight"]
        assert torch.equal(now, model.a.weight * (now != 0))
        assert 0 < float((now == 0).float().mean()) < 1
    else:
        half = result.forms["a.weight"].scale.decode().reshape(-1, 1, 1, 1) / 2  # of the first grid's step
        assert ((result.state_dict()["a.weight"] - model.a.weight).abs() <= half * 1.001).all()
    (note,) = result.ledger.notes("frozen")
    assert note.text == "2 frozen tensors not trained: a.weight, head.bias; 1 module kept in eval mode: n"
    assert note.data == {"tensors": 2, "modules": 1, "dtypes": 0}
    assert not list(free.ledger.notes("frozen"))
    trained = {"a.bias", "n.weight", "n.bias", "b.weight", "m.running_mean"}
    # eval() freezes statistics, not weights.
    assert trained <= {entry.site for entry in result.ledger.edits()}


def test_modules_in_eval_mode_stay_so_during_the_loop() -> None:
    model, seen = net(), []
    model.drop.eval()
    model.drop.register_forward_hook(Watch(seen))
    run(model, Finetune(epochs=1), TASK)
    assert seen
    assert not any(training for training, changed in seen)
    assert not any(changed for training, changed in seen)


class Watch:
    def __init__(self, seen: list[tuple[bool, bool]]):
        self.seen = seen

    def __deepcopy__(self, memo: Any) -> "Watch":
        return self

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen.append((module.training, not torch.equal(out, args[0])))


@pytest.mark.parametrize("step", [Quantize(bits=4, epochs=3, lr=0.1), Finetune(epochs=3, lr=0.1)])
def test_the_others_learn_with_the_stored_frozen_weights(step: Any) -> None:
    """A frozen weight that changes in the loop, even if it is restored later, would mislead the others."""
    model, seen = net(), []
    model.a.register_forward_hook(Weights(seen))
    result = run(model, step, TASK)
    assert len(seen) > 4
    for weight in seen[1:]:  # the first forward, a check of the task, has the given weights
        torch.testing.assert_close(weight, result.state_dict()["a.weight"], rtol=1e-5, atol=1e-6)


class Weights:
    """A hook that stores the weights a module runs with in training; its copies are itself."""

    def __init__(self, seen: list[Tensor]):
        self.seen = seen

    def __deepcopy__(self, memo: Any) -> "Weights":
        return self

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if module.training:
            self.seen.append(module.weight.detach().clone())


def test_one_mode_for_all_modules_freezes_nothing() -> None:
    for mode in (True, False):
        model = net(frozen=False).train(mode)
        assert frozen_in(model, {}).modules == ()
        result = run(model, Finetune(epochs=1), TASK)
        assert not same(result, model, "n.running_mean", "m.running_mean")
        assert not list(result.ledger.notes("frozen"))


def test_different_modes_are_kept_if_the_model_itself_is_in_eval_mode() -> None:
    model = net(frozen=False).eval()
    model.m.train()
    result = run(model, Finetune(epochs=1), TASK)
    assert same(result, model, *STATISTICS)
    assert not same(result, model, "m.running_mean")
    (note,) = result.ledger.notes("frozen")
    assert note.text == "6 modules kept in eval mode: the model itself, a, n, b and 2 more"


def test_a_module_in_eval_mode_is_named_by_its_outermost() -> None:
    model = nn.Sequential(tiny("conv").model, nn.Linear(3, 3))
    found = frozen_in(model, {})
    assert len(found.modules) == 7
    assert found.summary()[0] == "7 modules kept in eval mode: 0"


def test_where_with_only_frozen_weights_is_refused() -> None:
    with pytest.raises(SettingError) as caught:
        run(net(), Finetune(epochs=1, where="a.weight"), TASK)
    assert str(caught.value) == (
        "finetune: nothing is left to train: requires_grad=False for a.weight. Unfreeze them, "
        "name others in where, or give frozen='train'"
    )
    result = run(net(), Finetune(epochs=1, where="a.weight,b.weight"), TASK)
    (note,) = result.ledger.notes("frozen")
    assert note.text.startswith("1 frozen tensor not trained: a.weight")
    assert not list(result.ledger.notes("skipped"))
    named = run(net(), Finetune(epochs=1, where="a.weight", frozen="train"), TASK)
    assert not same(named, net(), "a.weight")


def test_a_fully_frozen_model_is_refused_with_the_way_out() -> None:
    model = net().requires_grad_(False)
    with pytest.raises(SettingError, match=r"prune: nothing is left to train: .* a\.weight, .* and 6 more"):
        run(model, Prune(epochs=1), TASK)
    assert len(run(model, Prune(), TASK).ledger.entries)


def test_a_state_from_a_file_takes_frozen_tensors_from_its_module(tmp_path: Path) -> None:
    pruned = run(net(frozen=False), Prune(keep=0.5))
    save(pruned, tmp_path / "a.tersor")
    before = load(tmp_path / "a.tersor").on(net())
    after = run(before, Finetune(epochs=2, lr=0.1), TASK)
    assert torch.equal(after.state_dict()["a.weight"], pruned.state_dict()["a.weight"])
    assert not torch.equal(after.state_dict()["b.weight"], pruned.state_dict()["b.weight"])


def test_coded_weights_that_are_frozen_stay_coded() -> None:
    from tersor import Entropy

    coded = run(net(), [Prune(keep=0.4), Quantize(bits=4), Entropy(coder="huffman")])
    after = run(coded, Finetune(epochs=1, lr=0.1), TASK)
    assert after.forms["a.weight"] is coded.forms["a.weight"]
    narrower = run(coded, Prune(keep=0.2, epochs=2, lr=0.1, ramp=0.5), TASK)
    now = narrower.state_dict()["a.weight"]
    assert torch.equal(now, coded.state_dict()["a.weight"] * (now != 0))


def test_a_custom_loop_keeps_them_too() -> None:
    model = net()
    module = trainable(run(model, Prune(keep=1.0)))
    assert not module.net.n.training
    assert module.net.m.training
    assert not module.eval().net.m.training
    module.train()
    assert not module.net.n.training
    learned = {key.split(".")[1] for key, _ in module.named_parameters()}
    assert not learned & {"/a/weight", "/head/bias"}
    assert "/n/weight" in learned


class Waves(nn.Module):
    """A complex parameter and an integer parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.count = nn.Parameter(torch.arange(5), requires_grad=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.wave).abs() + self.count)


def test_parameters_of_dtypes_that_do_not_train_are_named() -> None:
    t = tiny("mlp")
    model = Waves()
    for step in (Finetune(epochs=1, lr=0.1), Distill(epochs=1, lr=0.1), Prune(epochs=1)):
        result = run(model, step, t.task)
        assert same(result, model, "wave", "count")
        (note,) = result.ledger.notes("frozen")
        assert note.text == "2 parameters not trained because of the dtype: wave, count"


@pytest.mark.parametrize("step", [Finetune(epochs=3, lr=0.1), Prune(keep=0.4, epochs=3, ramp=0.8, lr=0.1)])
def test_a_killed_training_resumes_to_the_same_bits(step: Any, tmp_path: Path) -> None:
    model = net()
    whole = run(copy.deepcopy(model), step, TASK)
    assert resumed(model, step, TASK, tmp_path).ledger.digest == whole.ledger.digest


def test_slim_cuts_frozen_tensors_and_does_not_refit_them() -> None:
    model = net()
    result = run(model, Slim(keep=0.6, of="units", by="l2", unmet="nearest"), TASK)
    for name in (*STATISTICS, "a.weight", "head.bias"):
        value = model.state_dict()[name]
        for axis, kept in result.kept.get(name, {}).items():
            value = value.index_select(axis, torch.tensor(kept))
        assert torch.equal(result.state_dict()[name], value), name
    assert result.kept, "something was cut"
