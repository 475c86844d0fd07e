"""Quantize with awq=true: the same network in float, smaller errors, factors where they belong, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.errors import SettingError, TersorError
from tersor.forms import Affine
from tersor.model.scaled_inputs import ScaledInputs
from tersor.model.task import Task
from tersor.steps import Prune, Quantize


class Layer(nn.Module):
    """As in a transformer: a norm before two layers, and one after an activation."""

    def __init__(self, norm: Any = nn.LayerNorm, *, also: bool = False):
        super().__init__()
        self.norm, self.also = norm(16), also
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return out + y if self.also else x + out


def net_of(make: Any, *, spread: float = 12.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().eval()
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                    module.weight[::5] *= spread  # outliers, as large language models have them
                    if isinstance(module, nn.LayerNorm):
                        module.bias.uniform_(-0.3, 0.3)
    return net


def task() -> tuple[Task, Tensor]:
    x = torch.randn(120, 5, 16, generator=torch.Generator().manual_seed(1))
    batches = [(x[at : at + 40], torch.zeros(40, dtype=torch.int64)) for at in (0, 40, 80)]
    return Task("t", evaluate=batches, calibrate=batches), x


@torch.no_grad()
def error(state: Any, net: nn.Module, x: Tensor) -> float:
    return float((state.model().eval()(x) - net(x)).square().mean())


def note(state: Any) -> Any:
    (found,) = state.ledger.notes("awq")
    return found


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_that_only_these_layers_read_takes_the_factors(norm: Any) -> None:
    """Exactly: with 16 bits the network is the float one, with 3 it is nearer to it than without."""
    (on, x), net = task(), net_of(lambda: Layer(norm))
    fine = run(net, Quantize(bits=16, awq=True), on)
    assert error(fine, net, x) < 1e-7
    plain, aware = (run(net, Quantize(bits=3, per="group", group=8, awq=awq), on) for awq in (False, True))
    assert note(aware).data["folded"] == ["norm"]
    assert {"gate", "up"} <= set(note(aware).data["error"])
    assert error(aware, net, x) < 0.9 * error(plain, net, x)
    model = aware.model()
    assert not isinstance(model.gate, ScaledInputs)
    assert not torch.equal(model.norm.weight, net.norm.weight)


def test_layers_whose_inputs_are_not_finite_are_named() -> None:
    (on, x), net = task(), net_of(Layer)
    bad = x[:40].clone()
    bad[0, 0, 0] = torch.inf
    batches = [*on.batches("calibrate"), (bad, torch.zeros(40, dtype=torch.int64))]
    result = run(net, Quantize(bits=3, awq=True), Task("t", evaluate=on.evaluate, calibrate=batches))
    assert note(result).data["blind"] == ["gate", "up", "down"]
    assert "NaN or infinite: inputs of gate, up, down" in note(result).text


def test_a_frozen_norm_stays() -> None:
    (on, _), net = task(), net_of(Layer)
    net.norm.requires_grad_(False)
    result = run(net, Quantize(bits=3, per="group", group=8, awq=True), on)
    assert note(result).data["folded"] == []
    assert torch.equal(result.model().norm.weight, net.norm.weight)
    assert isinstance(result.model().gate, ScaledInputs)


@pytest.mark.sampled(rounding="gptq")
@pytest.mark.parametrize("rounding", ["gptq", "brecq"])
def test_float64_with_roundings_by_outputs(rounding: str) -> None:
    (on, x), net = task(), net_of(Layer).double()
    wide = [(batch.double(), y) for batch, y in on.batches("calibrate")]
    on = Task("t", evaluate=wide, calibrate=wide)
    result = run(net, Quantize(bits=4, awq=True, rounding=rounding), on)
    plain = run(net, Quantize(bits=4), on)
    assert error(result, net, x.double()) < 0.5 * error(plain, net, x.double())


def test_the_scaled_network_in_float_is_the_same_to_1e_6() -> None:
    (on, x), net = task(), net_of(Layer)
    aware = run(net, Quantize(bits=3, per="group", group=8, awq=True), on)
    model = aware.model().eval()
    exact = {name: e for e in aware.ledger.entries for name in [e.site] if e.kind == "done"}
    assert "gate.weight" in exact
    with torch.no_grad():  # the float weights, scaled as the norm was
        s = net.norm.weight / model.norm.weight
        assert ((net.norm.bias / model.norm.bias) / s - 1).abs().max() < 1e-5
        y = model.norm(x)
        assert (y * s - net.norm(x)).abs().max() < 1e-5
        gate = nn.functional.linear(y, net.gate.weight * s, net.gate.bias)
        largest = net.gate(net.norm(x)).abs().max()
        assert (gate - net.gate(net.norm(x))).abs().max() < 1e-6 * largest


def test_layers_after_what_others_read_too_multiply_their_inputs() -> None:
    (on, x), net = task(), net_of(lambda: Layer(also=True))
    aware = run(net, Quantize(bits=3, per="group", group=8, awq=True), on)
    model = aware.model()
    assert note(aware).data["folded"] == []
    assert isinstance(model.gate, ScaledInputs)
    assert torch.equal(model.gate.factor, model.up.factor)
    assert torch.equal(model.norm.weight, net.norm.weight)
    plain = run(net, Quantize(bits=3, per="group", group=8), on)
    assert error(aware, net, x) < 0.9 * error(plain, net, x)


def test_a_linear_layer_before_takes_the_factors_into_its_rows() -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12))
        with torch.no_grad():
            net[0].weight[::3] *= 15
            net[0].bias[::3] *= 15
        return net

    (on, x), net = task(), net_of(make)
    aware = run(net, Quantize(bits=3, where="1.weight", awq=True, per="group", group=4), on)
    assert note(aware).data["folded"] == ["0"]
    model = aware.model()
    ratio = model[0].weight / net[0].weight
    assert (ratio - ratio[:, :1]).abs().max() < 1e-5
    assert (model[0].bias / net[0].bias - ratio[:, 0]).abs().max() < 1e-5
    plain = run(net, Quantize(bits=3, where="1.weight", per="group", group=4), on)
    assert error(aware, net, x) < error(plain, net, x)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_it_combines_with_the_ways_to_round(rounding: str) -> None:
    (on, x), net = task(), net_of(Layer)
    aware = run(net, Quantize(bits=3, rounding=rounding, awq=True), on)
    assert isinstance(aware.forms["gate.weight"], Affine)
    assert not note(aware).data["folded"] or note(aware).data["folded"] == ["norm"]
    (said,) = aware.ledger.notes("compensated")
    assert said.data["decibels"].keys() >= {"gate.weight", "up.weight", "down.weight"}
    assert error(aware, net, x) < error(run(net, Quantize(bits=3), on), net, x)


def test_masks_and_convolutions_are_left_and_two_runs_are_equal() -> None:
    (on, _), net = task(), net_of(Layer)
    pruned = run(net, Prune(keep=0.5, where="gate.weight"), on)
    one, two = (run(pruned, Quantize(bits=3, awq=True), on) for _ in range(2))
    assert one.digest == two.digest
    assert "gate" not in note(one).data["error"]
    assert "norm" not in note(one).data["folded"], "gate reads it too, and cannot be scaled"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"activations": 8}, "awq=True has no effect if activations=8"),
        ({"scheme": "log"}, "awq=True has no effect if scheme='log'"),
        ({"epochs": 1.0}, "awq=True has no effect if epochs=1.0"),
        ({"allowed": "2,4"}, "awq=True has no effect if allowed='2,4'"),
    ],
)
def test_settings_with_which_it_would_do_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Quantize(awq=True, **settings)


def test_it_needs_calibration_batches() -> None:
    net = net_of(Layer)
    with pytest.raises(TersorError, match="needs a task"):
        run(net, Quantize(bits=4, awq=True))
