"""Extremes: finite weights of any size are rounded correctly or refused by name, without crashes and NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, TersorError
from tersor.model.task import Task
from tersor.steps import Cluster, Entropy, Factorize, Penalize, Prune, Quantize, Rdoq, Slim

OUTS, INS = 12, 20
MOST = {torch.float32: 3.4e38, torch.float16: 65504.0, torch.bfloat16: 3.38e38}


def drawn(seed: int = 1) -> Tensor:
    return torch.randn(OUTS, INS, generator=torch.Generator().manual_seed(seed))


def one(value: float, rest: float) -> Tensor:
    w = torch.full((OUTS, INS), rest)
    w[3, 5] = value
    return w


WEIGHTS = {
    "large": drawn() * 5e37,
    "largest": drawn().sign() * 3.4e38,
    "denormal": torch.full((OUTS, INS), 1e-45),
    "tiny": drawn() * 1e-37,
    "mixed": drawn() * torch.logspace(-44, 37, OUTS)[:, None],
    "mixed columns": drawn() * torch.logspace(-44, 37, INS),
    "equal": torch.full((OUTS, INS), 0.3),
    "zero": torch.zeros(OUTS, INS),
    "one large": one(3e38, 1.0),
    "one tiny": one(1e-45, 0.0),
    "one element": torch.full((1, 1), 3e38),
    "float16": (drawn() * 2e4).clamp(-65504, 65504).half(),
    "largest float16": (drawn().sign() * 65504).half(),
    "smallest float16": torch.full((OUTS, INS), 6e-8).half(),
    "largest bfloat16": (drawn().sign() * 3.38e38).bfloat16(),
    "smallest bfloat16": torch.full((OUTS, INS), 9.2e-41).bfloat16(),
}
RECIPES = {
    "free": lambda: [Rdoq(lam=1e-300)],
    "dear": lambda: [Rdoq(lam=1e300)],
    "bits": lambda: [Rdoq(bits=3), Entropy()],
    "both": lambda: [Rdoq(bits=3, per="both")],
    "nbytes": lambda: [Rdoq(nbytes=400), Entropy()],
    "pruned": lambda: [Prune(keep=0.3), Rdoq(bits=3), Entropy()],
    "product": lambda: [Factorize(keep=0.5), Rdoq(bits=4)],
    "quantize": lambda: [Quantize(bits=3, range="mse", symmetric=False), Entropy()],
    "log": lambda: [Quantize(scheme="log", bits=4, range="mse")],
    "cluster": lambda: [Cluster(entries=4), Entropy()],
}


def compressed(w: Tensor, name: str) -> State:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    return run(layer, RECIPES[name]())


def refused_or(make: Callable[[], State]) -> tuple[str, State | None]:
    """(what a refusal says, nothing), or ("", the result)."""
    try:
        return "", make()
    except TersorError as error:
        return str(error), None


def all_finite(result: State) -> bool:
    return all(bool(form.decode().isfinite().all()) for form in result.forms.values())


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_finite_weights_stay_finite_or_are_refused(kind: str, recipe: str) -> None:
    refusal, result = refused_or(lambda: compressed(WEIGHTS[kind], recipe))
    assert not refusal or recipe == "nbytes" or "weight" in refusal, "it names the site"
    assert result is None or all_finite(result)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_where_bits_cost_nothing_weights_are_as_fine_as_codes_can_be(kind: str) -> None:
    """The error is at most half a step of 16 bits, half the smallest step of float32, or the dtype's
    rounding."""
    w = WEIGHTS[kind]
    found = compressed(w, "free").forms["weight"].decode().double()
    peak = float(w.double().abs().max())
    step = max(peak / 32767, 2.0**-126)
    assert float((found - w.double()).abs().max()) <= 0.501 * step + 1e-6 * peak * (peak > MOST[w.dtype] / 2)


def test_the_weights_that_ended_in_a_segmentation_fault() -> None:
    """NaN was used as an index."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layers = []
    for unit in (1.0, 2.0**125):
        layer = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            layer.weight.copy_(w * unit)
        layers.append(run(layer, Rdoq(lam=0.1)).forms["weight"])
    assert torch.equal(layers[0].decode() * 2.0**125, layers[1].decode()), "as with weights near 1"


SCALES = {"zero": 0.0, "tiny": 1e-30, "usual": 1.0, "large": 1e19, "huge": 1e37}
TRAINED = {
    "output": lambda: [Rdoq(bits=3, weigh="output")],
    "inputs": lambda: [Rdoq(bits=3, weigh="inputs")],
    "no damp": lambda: [Rdoq(bits=3, weigh="inputs", damp=1e-30)],
    "product": lambda: [Factorize(keep=0.6, whiten=False), Rdoq(bits=3, weigh="output")],
    "penalize": lambda: [Penalize(epochs=1)],
    "penalize dear": lambda: [Penalize(epochs=1, price=1e30)],
    "penalize wide": lambda: [Penalize(epochs=1, step=1e30)],
}


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", TRAINED)
@pytest.mark.parametrize("inputs", SCALES)
@pytest.mark.parametrize("size", ["zero", "tiny", "usual", "large"])
def test_data_of_any_size_too(size: str, inputs: str, recipe: str) -> None:
    """A curvature of zero, and one beyond float32, give a result or a message."""
    g = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(INS, OUTS), nn.ReLU(), nn.Linear(OUTS, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * SCALES[size])
    data = [
        (torch.randn(8, INS, generator=g) * SCALES[inputs], torch.randint(0, 4, (8,), generator=g))
        for _ in range(2)
    ]
    task = Task(
        "extreme", train=data, evaluate=data, calibrate=data, loss=nn.functional.cross_entropy,
        metric="accuracy",
    )  # fmt: skip
    refusal, result = refused_or(lambda: run(model, TRAINED[recipe](), task))
    assert not refusal or (size, inputs) != ("usual", "usual") or recipe == "no damp"
    assert result is None or all_finite(result)


def test_bits_of_weights_that_are_all_alike_are_found() -> None:
    """Their bits stay the same for octaves of the price, and then fall to almost none."""
    layer = nn.Linear(INS, OUTS, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.3)
    result = run(layer, Rdoq(bits=3, per="tensor"))
    assert sum(e.data["bits"] for e in result.ledger.entries if "bits" in e.data) <= 3 * INS * OUTS


@pytest.mark.parametrize("step", [Slim(keep=0.5), Factorize(keep=0.5), Rdoq(bits=3)], ids=str)
def test_activations_that_overflow_are_named_with_a_way_out(step: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        net[0].weight[0, 0] = 3e38
    x = torch.randn(64, 16)
    task = Task("t", evaluate=[(x, x[:, :4].argmax(1))], calibrate=[(x,)])
    with pytest.raises(RefusedError, match=r"NaN or infin.*(by='l2'|whiten=false|weigh='none')"):
        run(net, step, task)
