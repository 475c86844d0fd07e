"""Quantize with rounding=brecq: errors of blocks, structure that stays, and what is named."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.forms import Affine
from tersor.model import block_calls, joint_rounding
from tersor.model.integer_weights import integer_weight
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.steps import Fold, Prune, Quantize


def task_of(x: Any, batch: int = 40) -> Task:
    y = torch.zeros(len(x), dtype=torch.int64)
    return Task("t", evaluate=TensorBatches(x, y, batch=batch), calibrate=TensorBatches(x, y, batch=batch))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Inputs that correlate and have a mean, as after a relu."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x + 0.7 * x.roll(1, 1) + 0.4).relu()


def seeded(make: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


class Residual(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def deep() -> nn.Module:
    """Three residual blocks, and a layer that is in none."""
    return nn.Sequential(Residual(), Residual(), Residual(), nn.Linear(12, 4))


def note(result: State, kind: str = "blocks") -> Any:
    (found,) = result.ledger.notes(kind)
    return found


@torch.no_grad()
def error(result: State, net: nn.Module, x: Tensor) -> float:
    return float((result.model().eval()(x) - net(x)).square().mean())


@pytest.mark.sampled(bits=3)
@pytest.mark.parametrize(
    ("bits", "more"),
    [(2, {}), (4, {}), (3, {"symmetric": False}), (2, {"per": "group", "group": 5}), (4, {"per": "tensor"})],
)
def test_the_error_of_a_block_is_below_that_of_each_layer_alone(bits: int, more: dict[str, Any]) -> None:
    """The whole network is one block, so its error on the calibration data is that of its outputs."""
    net, x = seeded(Residual, bits), draw(200, 12)
    nearest, gptq, brecq = (
        run(net, Quantize(bits=bits, rounding=word, **more), task_of(x))
        for word in ("nearest", "gptq", "brecq")
    )
    errors = [error(each, net, x) for each in (nearest, gptq, brecq)]
    assert errors[2] <= errors[1] < errors[0]
    if more != {"per": "tensor"}:  # whose one scale leaves little to learn
        assert errors[2] < 0.95 * errors[1]
    for gain in note(brecq).data["decibels"].values():
        assert gain == pytest.approx(10 * math.log10(errors[1] / errors[2]), abs=0.05)


def test_codes_are_nearly_the_best_of_all_pairs() -> None:
    """Of all ways to take each weight's code of gptq or its neighbor, tried one by one, with its scales."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), 4)
    x = draw(120, 3)
    gptq, brecq = (run(net, Quantize(bits=3, rounding=word), task_of(x)) for word in ("gptq", "brecq"))
    weights, choices = ("0.weight", "2.weight"), []
    for name in weights:
        form = gptq.forms[name]
        assert isinstance(form, Affine)
        codes, scale = form.codes.decode().float(), form.scale.decode()
        exact = net.get_parameter(name) / scale
        other = torch.where(exact > codes, codes + 1, codes - 1).clamp(-3, 3)
        choices += [(float(a * s), float(b * s)) for a, b, s in zip(
            codes.flatten(), other.flatten(), scale.expand_as(codes).flatten(), strict=True)]  # fmt: skip
    model, least = gptq.model(), torch.inf
    with torch.no_grad():
        for values in itertools.product(*choices):
            model[0].weight.copy_(torch.tensor(values[:6]).view(2, 3))
            model[2].weight.copy_(torch.tensor(values[6:]).view(2, 2))
            least = min(least, float((model(x) - net(x)).square().mean()))
    assert error(brecq, net, x) < 1.3 * least
    assert error(gptq, net, x) > error(brecq, net, x)


def test_later_blocks_learn_from_what_the_rounded_ones_give() -> None:
    """The error after the last block stays below that of gptq, on other inputs too. The layer that is in no
    block is rounded as with gptq."""
    net, x, other = seeded(deep), draw(400, 12), draw(400, 12, seed=1)
    gptq, brecq = (
        run(net, Quantize(bits=3, rounding=word), task_of(x)).model() for word in ("gptq", "brecq")
    )
    with torch.no_grad():
        for inputs in (x, other):
            errors = [float((each[:3](inputs) - net[:3](inputs)).square().mean()) for each in (gptq, brecq)]
            assert errors[1] < 0.9 * errors[0]


def test_a_block_that_learns_nothing_keeps_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = seeded(deep), draw(80, 12)
    plain = run(net, Quantize(bits=3, rounding="gptq"), task_of(x))
    learned = joint_rounding.JointRounding.run

    def worse(self: Any, seed: int) -> tuple[float, float]:
        old, _ = learned(self, seed)
        return old, 2 * old

    monkeypatch.setattr(joint_rounding.JointRounding, "run", worse)
    monkeypatch.setattr(joint_rounding, "STEPS", 20)
    result = run(net, Quantize(bits=3, rounding="brecq"), task_of(x))
    assert note(result).data["kept"] == ["0", "1", "2"]
    for name in result.forms:
        assert torch.equal(result.forms[name].decode(), plain.forms[name].decode())


def test_what_was_learned_and_what_is_alone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_rounding, "STEPS", 200)
    said = note(run(seeded(deep), Quantize(bits=2, rounding="brecq"), task_of(draw(400, 12))))
    assert {*said.data["decibels"], *said.data["kept"]} == {"0", "1", "2"}
    assert said.data["alone"] == ["3"]
    assert " rounded together, error of their outputs " in said.text
    assert "in no block: 3" in said.text


@pytest.mark.wide
def test_the_same_seed_gives_the_same_and_the_given_model_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joint_rounding, "STEPS", 200)
    net, x = seeded(deep), draw(80, 12)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (run(net, Quantize(bits=2, rounding="brecq"), task_of(x)) for _ in range(2))
    assert one.digest == two.digest
    assert run(net, Quantize(bits=2, rounding="brecq"), task_of(x), seed=1).digest != one.digest
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.sampled(symmetric=False)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_of_a_mask_and_frozen_biases_stay(symmetric: bool) -> None:
    net, x = seeded(Residual), draw(120, 12)
    net.second.bias.requires_grad_(False)
    pruned = run(net, Prune(keep=0.5), task_of(x))
    made = run(pruned, Quantize(bits=3, rounding="brecq", symmetric=symmetric), task_of(x))
    for name in ("first.weight", "second.weight"):
        assert (made.forms[name].decode()[pruned.forms[name].decode() == 0] == 0).all()
    assert torch.equal(made.forms["second.bias"].decode(), net.second.bias)
    plain = run(pruned, Quantize(bits=3, rounding="gptq", symmetric=symmetric), task_of(x))
    before = pruned.model()
    assert error(made, before, x) < 0.98 * error(plain, before, x)


class Images(nn.Module):
    """A residual block of convolutions, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))


@pytest.mark.wide
@pytest.mark.parametrize("activations", [0, 8])
def test_convolutions_with_and_without_integers_of_activations(activations: int) -> None:
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Images(), Images(),
                                       nn.Flatten(), nn.Linear(4 * 49, 5)))  # fmt: skip
    x = draw(80, 3, 7, 7)
    gptq, brecq = (
        run(net, [Fold(), Quantize(bits=2, rounding=word, activations=activations)], task_of(x))
        for word in ("gptq", "brecq")
    )
    assert list(note(brecq).data["decibels"]) == ["2", "3"]
    models = [state.model().net if activations else state.model() for state in (gptq, brecq)]
    with torch.no_grad():  # the last layer, in no block, is rounded as with gptq
        errors = [float((model[:4](x) - net[:4](x)).square().mean()) for model in models]
    assert errors[1] < 0.9 * errors[0]
    if activations:
        assert brecq.grids.keys() == gptq.grids.keys()
        weight = integer_weight(brecq.forms["2.conv1.weight"])
        assert not isinstance(weight, str)
        assert int(weight.codes.abs().max()) <= 1


def test_grids_round_inside_of_a_block_while_it_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With coarse grids the error that is compared is that of the block with them."""
    seen: list[set[str]] = []
    run_of = joint_rounding.JointRounding.run

    def watched(self: Any, seed: int) -> tuple[float, float]:
        assert self.grids is not None
        seen.append({*self.grids.table})
        errors = run_of(self, seed)
        (chunk, *_) = self.chunks
        with torch.no_grad():
            whole = self.answer({}, chunk.rounded)
            plain = self.alone(*chunk.rounded[0])
        assert 0 < float((whole - plain).abs().max()) < float(plain.abs().max()) / 50
        return errors

    monkeypatch.setattr(joint_rounding.JointRounding, "run", watched)
    monkeypatch.setattr(joint_rounding, "STEPS", 20)
    net, x = seeded(lambda: nn.Sequential(nn.Linear(6, 12), Residual())), draw(80, 6)
    run(net, Quantize(bits=4, rounding="brecq", activations=8), task_of(x))
    assert any(name.startswith("1.second/linear") or name.startswith("1/relu") for name in seen[0])


class Twice(nn.Module):
    """A block that runs twice, one that reads what is no tensor, and one that depends on a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.odd, self.counts = Residual(), Odd(), Counts()

    def forward(self, x: Tensor) -> Tensor:
        return self.counts(self.odd(self.again(self.again(x)), {1, 2}))


class Odd(Residual):
    def forward(self, x: Tensor, more: Any) -> Tensor:
        return super().forward(x) * len(more)


class Counts(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_blocks_that_cannot_run_alone_are_named_and_keep_gptq() -> None:
    net, x = seeded(Twice), draw(80, 12)
    result = run(net, Quantize(bits=3, rounding="brecq"), task_of(x))
    said = note(result)
    assert said.data["left"] == {
        "again": "it is called several times", "odd": "it reads a set",
        "counts": "it does not give the same when it runs alone",
    }  # fmt: skip
    assert "not together: again (it is called several times), odd (it reads a set)" in said.text
    plain = run(net, Quantize(bits=3, rounding="gptq"), task_of(x))
    for name in result.forms:
        assert torch.equal(result.forms[name].decode(), plain.forms[name].decode())


class Inference(Residual):
    """Code that runs, and that gradients do not pass through."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).sigmoid()
        if self.kind == "in place":
            hidden.mul_(2)
        return x + (self.second(hidden).detach() if self.kind == "detached" else self.second(hidden))


@pytest.mark.sampled(activations=0, kind="detached")
@pytest.mark.parametrize("kind", ["in place", "detached"])
@pytest.mark.parametrize("activations", [0, 8])
def test_blocks_without_gradients_keep_gptq(kind: str, activations: int) -> None:
    net, x = seeded(lambda: nn.Sequential(Residual(), Inference(kind))), draw(80, 12)
    quantize = Quantize(bits=3, rounding="brecq", activations=activations)
    assert note(run(net, quantize, task_of(x))).data["left"] == {"1": "no gradients pass through it"}


def test_a_block_with_a_layer_that_is_rounded_to_the_nearest_is_left() -> None:
    net, x = seeded(lambda: nn.Sequential(Residual(), Residual())), draw(8, 12)
    x[:, 0] = torch.inf
    said = note(run(net, Quantize(bits=3, rounding="brecq"), task_of(x)))
    assert said.data["left"] == {
        "0": "0.first.weight is rounded to the nearest",
        "1": "1.first.weight is rounded to the nearest",
    }


def test_memory_is_bounded_and_what_is_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = seeded(deep), draw(160, 12)
    room = 3 * 40 * 12 * 4  # inputs of both networks and outputs, of one batch
    monkeypatch.setattr(block_calls, "HELD", room)
    monkeypatch.setattr(joint_rounding, "STEPS", 20)
    held: list[int] = []
    run_of = joint_rounding.JointRounding.run

    def watched(self: Any, seed: int) -> tuple[float, float]:
        held.append(sum(each.target.nbytes + each.rounded[0][0].nbytes + each.floats[0][0].nbytes
                        for each in self.chunks))  # fmt: skip
        return run_of(self, seed)

    monkeypatch.setattr(joint_rounding.JointRounding, "run", watched)
    said = note(run(net, Quantize(bits=3, rounding="brecq"), task_of(x)))
    assert held == [room] * 3
    assert said.data["thin"] == {"0": 3, "1": 3, "2": 3}
    assert "no room for batches of: 0 (3), 1 (3), 2 (3)" in said.text


def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block gives for padding tokens may be anything."""
    monkeypatch.setattr(joint_rounding, "STEPS", 100)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.block, self.last = nn.Embedding(9, 12), Residual(), nn.Linear(12, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.last(self.block(self.words(input_ids)))

    net = seeded(Model)
    ids = torch.randint(1, 9, (60, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(60, 5, dtype=torch.int64)
    mask[::2, 3:] = 0
    made = []
    for padding in (0, 7):
        filled = torch.where(mask > 0, ids, padding)
        batch = {"input_ids": filled, "attention_mask": mask, "labels": torch.zeros(60, dtype=torch.int64)}
        on = Task(
            "t", evaluate=[batch], calibrate=[batch], feed=lambda m, b: m(b["input_ids"], b["attention_mask"])
        )
        made.append(run(net, Quantize(bits=3, rounding="brecq"), on))
    assert torch.equal(*(each.forms["block.first.weight"].decode() for each in made))
    assert note(made[0]).data["decibels"]
