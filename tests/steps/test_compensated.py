"""Quantize with rounding=gptq and adaround: outputs, biases, structure that stays, and what is named."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.core.state import State
from tersor.forms import Affine
from tersor.model.integer_weights import integer_weight
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.steps import Factorize, Fold, Prune, Quantize
from tersor.steps.few_bits import better


def task_of(x: Tensor, batch: int = 16) -> Task:
    y = torch.zeros(len(x), dtype=torch.int64)
    return Task("t", evaluate=TensorBatches(x, y, batch=batch), calibrate=TensorBatches(x, y, batch=batch))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Inputs that correlate and have a mean, as after a relu."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x + 0.7 * x.roll(1, 1) + 0.4).relu()


def notes(result: State, kind: str, site: str = "") -> list[Any]:
    return [e for e in result.ledger.entries if e.kind == kind and e.site == site]


@torch.no_grad()
def error(result: State, net: nn.Module, x: Tensor) -> Tensor:
    """y' - y, with the channels last: [N, O]."""
    gap = result.model().eval()(x) - net(x)
    return gap if gap.ndim == 2 else gap.movedim(1, -1).reshape(-1, gap.shape[1])


def seeded(make: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


ROUNDINGS = pytest.mark.parametrize("rounding", ["gptq", "adaround", "brecq"])

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (40, 7)),
    "no bias": (lambda: nn.Linear(7, 5, bias=False), (40, 7)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (12, 3, 6, 5)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (12, 6, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), (12, 4, 7, 7)),
    "conv 1-D": (lambda: nn.Conv1d(4, 4, 3), (20, 4, 9)),
}


@pytest.mark.sampled
@ROUNDINGS
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=8)
@given(st.integers(2, 5), st.sampled_from(["tensor", "channel", "group"]), st.booleans(), st.integers(0, 99))
def test_outputs_are_never_further_off_than_with_nearest(  # noqa: PLR0917  pytest and hypothesis fill them
    name: str, rounding: str, bits: int, per: str, symmetric: bool, seed: int
) -> None:
    """On the calibration data, in the layer's own outputs."""
    make, shape = LAYERS[name]
    net, x = nn.Sequential(seeded(make, seed)), draw(*shape, seed=seed)
    more: dict[str, Any] = {"per": per, "symmetric": symmetric} | ({"group": 4} if per == "group" else {})
    errors = [
        float(error(run(net, Quantize(bits=bits, rounding=r, **more), task_of(x)), net, x).square().mean())
        for r in ("nearest", rounding)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-4)


@ROUNDINGS
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("no bias", "grouped")])
def test_the_mean_error_of_each_output_is_zero(name: str, rounding: str) -> None:
    make, shape = LAYERS[name]
    net, x = nn.Sequential(seeded(make, 1)), draw(*shape)
    plain, made = (
        error(run(net, Quantize(bits=2, rounding=r), task_of(x)), net, x) for r in ("nearest", rounding)
    )
    assert plain.mean(0).abs().max() > 1e-2
    assert made.mean(0).abs().max() < 1e-5
    assert made.std() > 1e-2, "the weights are rounded all the same"


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-6])
@pytest.mark.parametrize("count", [1, 13, 39])
def test_inputs_that_hardly_vary_leave_weights_near_their_floats(count: int, spread: float) -> None:
    """Their covariance is a difference of nearly equal numbers. Its error is no second moment: it may have no
    inverse, and fitting it would move weights far."""
    net, one = nn.Sequential(seeded(lambda: nn.Linear(64, 5), 1)), draw(1, 64) + 1
    x = one * (1 + spread * torch.randn(count, 64, generator=torch.Generator().manual_seed(0)))
    result = run(net, Quantize(bits=4, rounding="gptq"), task_of(x, batch=13))
    assert error(result, net, x).abs().max() < 1e-5, "the bias takes the error of the only input"
    step = float(net[0].weight.detach().abs().max()) / 7
    assert (result.model()[0].weight - net[0].weight).abs().max() <= 2 * step


def net_of_many() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 49, 5),
    )  # fmt: skip


@pytest.mark.sampled(rounding=("gptq", "adaround"))
@ROUNDINGS
def test_a_layer_corrects_what_the_layers_before_it_got_wrong(rounding: str) -> None:
    """The error of the whole is far below that of rounding to nearest, and below rounding each layer for the
    inputs that it had before: what the last layer alone still has to round."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))
    x = draw(400, 16)
    plain, whole = (
        float(error(run(net, Quantize(bits=3, rounding=r), task_of(x)), net, x).square().mean())
        for r in ("nearest", rounding)
    )
    assert whole < 0.25 * plain
    apart = copy.deepcopy(net)
    for k in (0, 2, 4):  # each for the inputs that it has in the float model
        forms = run(net, Quantize(bits=3, rounding=rounding, where=f"{k}.weight"), task_of(x)).forms
        apart.load_state_dict({n: forms[n].decode() for n in (f"{k}.weight", f"{k}.bias")}, strict=False)
    with torch.no_grad():
        each = float((apart(x) - net(x)).square().mean())
    assert whole < 0.8 * each


@pytest.mark.sampled(rounding=("gptq", "adaround"))
@ROUNDINGS
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_of_a_mask_stay_zeros(symmetric: bool, rounding: str) -> None:
    net, x = net_of_many(), draw(32, 3, 8, 8)
    pruned = run(net, Prune(keep=0.4), task_of(x))
    made = run(pruned, Quantize(bits=3, rounding=rounding, symmetric=symmetric), task_of(x))
    for name, site in made.sites.items():
        if site.is_weight:
            assert (made.forms[name].decode()[pruned.forms[name].decode() == 0] == 0).all()
    plain = run(pruned, Quantize(bits=3, symmetric=symmetric), task_of(x))
    before = pruned.model()
    errors = [float(error(each, before, x).square().mean()) for each in (plain, made)]
    assert errors[1] < 0.5 * errors[0]


def test_what_is_rounded_to_the_nearest_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.mixer = nn.MultiheadAttention(6, 2, batch_first=True)
            self.up, self.never = nn.ConvTranspose1d(6, 6, 2), nn.Linear(6, 6)
            self.thin, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(self.words(x)).relu())
            x = self.up(self.mixer(x, x, x)[0].mT).mT
            return self.last(self.thin(x).relu()).mean(1)

    torch.manual_seed(0)
    net, x = Net(), torch.randint(0, 9, (32, 5))
    on = task_of(x)
    thin = run(net, Factorize(rank=2, where="thin.weight"), on)
    result = run(thin, Quantize(bits=4, rounding="gptq"), on)
    (note,) = notes(result, "compensated")
    left = note.data["nearest"]
    assert left["words.weight"] == "the inputs of Embedding are not observed"
    assert left["a.weight"] == "several layers share it"
    assert left["never.weight"] == "its module is not called on calibration batches"
    assert left["up.weight"] == "the inputs of ConvTranspose1d are not observed"
    assert left["thin.weight"] == "it is stored as a product or a sum"
    assert {"mixer.in_proj_weight", "mixer.out_proj.weight"} < set(left)
    assert list(note.data["decibels"]) == ["last.weight"]
    assert "1 weight compensated" in note.text
    assert "words.weight (the inputs of Embedding" in note.text
    plain = run(thin, Quantize(bits=4, range="mse"), on)
    for name in left:
        assert torch.equal(result.forms[name].decode(), plain.forms[name].decode())


def test_frozen_biases_stay_and_frozen_weights_are_rounded() -> None:
    net, x = net_of_many(), draw(32, 3, 8, 8)
    net[0].requires_grad_(False)
    result = run(net, Quantize(bits=3, rounding="gptq"), task_of(x))
    assert torch.equal(result.forms["0.bias"].decode(), net[0].bias)
    assert isinstance(result.forms["0.weight"], Affine)
    assert not torch.equal(result.forms["2.bias"].decode(), net[2].bias)
    net.requires_grad_(False)
    result = run(net, Quantize(bits=3, rounding="gptq"), task_of(x))
    assert not torch.equal(result.forms["0.bias"].decode(), net[0].bias), "all frozen says nothing about one"


def test_other_weights_are_left_alone() -> None:
    net, x = net_of_many(), draw(32, 3, 8, 8)
    result = run(net, Quantize(bits=3, rounding="gptq", where="2.weight"), task_of(x))
    changed = [n for n, form in result.forms.items() if not torch.equal(form.decode(), net.state_dict()[n])]
    assert changed == ["2.weight", "2.bias"]


class Turned(nn.Module):
    """A linear layer of one's own with a weight [I, O], as GPT-2 has."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(ins, outs)), nn.Parameter(torch.zeros(outs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_linear_layers_of_ones_own_are_rounded_for_the_inputs_that_they_had() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Turned(8, 6), nn.ReLU(), Turned(6, 4)), draw(200, 8)
    result = run(net, Quantize(bits=3, rounding="gptq"), task_of(x))
    (note,) = notes(result, "compensated")
    assert list(note.data["decibels"]) == ["0.weight", "2.weight"]
    assert not note.data["nearest"]
    assert result.forms["0.weight"].axis == 1
    assert result.forms["0.weight"].scale.shape == (6, 1)
    with torch.no_grad():
        errors = [
            float((x @ (r.forms["0.weight"].decode() - net[0].weight)).square().mean())
            for r in (run(net, Quantize(bits=3), task_of(x)), result)
        ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.sampled(rounding=("gptq", "adaround"))
@ROUNDINGS
def test_integers_of_activations_follow_the_rounded_weights(rounding: str) -> None:
    """The weights are those of integer kernels; biases, corrected first, are multiples of their unit."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5),
    ).eval()  # fmt: skip
    x = draw(64, 3, 8, 8)
    plain, made = (
        run(net, [Fold(), Quantize(bits=3, activations=8, rounding=r)], task_of(x))
        for r in ("nearest", rounding)
    )
    errors = [float(error(each, net, x).square().mean()) for each in (plain, made)]
    assert errors[1] < 0.3 * errors[0]
    assert made.grids.keys() == plain.grids.keys()
    weight = integer_weight(made.forms["3.weight"])
    assert not isinstance(weight, str)
    assert int(weight.codes.abs().max()) <= 3
    (edge,) = [name for name in made.grids if name.startswith("2/")]
    unit = made.grids[edge].scale.decode().double() * weight.scale.double()
    codes = made.forms["3.bias"].decode().double() / unit
    assert (codes - codes.round()).abs().max() < 1e-2
    assert notes(made, "compensated")
    assert notes(made, "integers")


@pytest.mark.sampled(rounding="gptq")
@ROUNDINGS
def test_two_runs_are_equal_and_the_given_model_stays_as_it_was(rounding: str) -> None:
    net, x = net_of_many(), draw(32, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one, two = (run(net, Quantize(bits=3, rounding=rounding), task_of(x)) for _ in range(2))
    assert one.digest == two.digest
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_few_bits_to_the_nearest_come_with_advice_if_there_is_data() -> None:
    net, x = net_of_many(), draw(32, 3, 8, 8)
    (note,) = notes(run(net, Quantize(bits=4), task_of(x)), "advice")
    assert note.text.startswith("4 bits are rounded to the nearest; rounding=gptq or rdoq bits=4 loses less")
    whole = Quantize(bits=3, activations=8)
    (note,) = notes(run(net, whole, task_of(x)), "advice")
    assert "rdoq bits=3 per=channel before this step" in note.text, "the grids that integer kernels take"
    for result in (
        run(net, Quantize(bits=4)),
        run(net, Quantize(bits=5), task_of(x)),
        run(net, Quantize(scheme="ternary"), task_of(x)),
        run(net, Quantize(allowed="2,4"), task_of(x)),
        run(net, Quantize(bits=4, rounding="gptq"), task_of(x)),
    ):
        assert not notes(result, "advice")


def test_without_data_pack_names_the_other_way() -> None:
    said = "4 bits are rounded to the nearest; rdoq bits=4 loses less: docs/which.md"
    assert better(Quantize(bits=4)) == said
    for step in (Quantize(bits=5), Quantize(scheme="binary"), Quantize(bits=4, rounding="gptq")):
        assert not better(step)


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
def test_weights_that_are_integers_already_are_neither_rounded_nor_advised(rounding: str) -> None:
    net, x = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), draw(40, 7)
    before = run(net, Quantize(bits=3, rounding="gptq"), task_of(x))
    result = run(before, Quantize(bits=3, activations=8, rounding=rounding), task_of(x))
    for name in ("0.weight", "2.weight"):
        assert torch.equal(result.forms[name].codes.decode(), before.forms[name].codes.decode())
    assert not notes(result, "advice")
    text = {
        "nearest": [],
        "gptq": ["0 weights compensated"],
        "adaround": ["0 weights rounded up or down as learned"],
    }[rounding]
    assert [note.text for note in notes(result, "compensated")[1:]] == text


def test_inputs_that_are_not_finite_leave_a_layer_to_the_nearest() -> None:
    class Blown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (0, 1), value=torch.inf)[:, 1:]

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), Blown(), nn.Linear(4, 2)), draw(32, 4)
    (note,) = notes(run(net, Quantize(bits=4, rounding="gptq"), task_of(x)), "compensated")
    assert list(note.data["nearest"]) == ["2.weight"]
    assert list(note.data["decibels"]) == ["0.weight"]


def test_few_samples_are_said() -> None:
    """Eight rows of 24 inputs fix fewer directions than a row of weights has."""
    net = seeded(lambda: nn.Sequential(nn.Linear(24, 8)), 1)
    step = Quantize(bits=3, rounding="gptq")
    (little,) = notes(run(net, step, task_of(draw(8, 24))), "compensated")
    assert little.data["few"] == {"0.weight": "8 for 24 inputs"}
    assert "few samples, so that rounding may fit them alone" in little.text
    (much,) = notes(run(net, step, task_of(draw(64, 24))), "compensated")
    assert not much.data["few"]
    assert "few samples" not in much.text


def test_adaround_takes_a_level_beside_each_weight_of_the_first_layer() -> None:
    """A first layer is not refitted, so its weights are those given."""
    net, x = seeded(lambda: nn.Sequential(nn.Linear(40, 12)), 1), draw(400, 40)
    step = Quantize(bits=4, rounding="adaround", range="minmax")
    made = run(net, step, task_of(x)).forms["0.weight"]
    steps = (made.decode() - net[0].weight.detach()).abs() / made.scale.decode()
    assert steps.max() <= 1 + 1e-4
    assert (steps > 0.51).float().mean() > 0.1, "many are not rounded to the nearest"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adaround_keeps_dtypes_frozen_biases_and_a_shared_weight_at_the_nearest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    net[2].weight = net[0].weight
    net[4].bias.requires_grad_(False)
    x = draw(64, 8).to(dtype)
    result = run(net, Quantize(bits=3, rounding="adaround"), task_of(x))
    (note,) = notes(result, "compensated")
    assert note.data["nearest"] == {"0.weight": "several layers share it"}
    assert list(note.data["decibels"]) == ["4.weight"]
    assert note.text.startswith("1 weight rounded up or down as learned, error of outputs ")
    assert torch.equal(result.forms["4.bias"].decode(), net[4].bias)
    assert {parameter.dtype for parameter in result.model().parameters()} == {dtype}


def test_rows_that_keep_the_nearest_are_said() -> None:
    """Inputs without correlation leave nothing to learn; then all outputs are those of the nearest."""
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 4, bias=False)), 1)
    step = Quantize(bits=4, rounding="adaround", range="minmax")
    result = run(net, step, task_of(torch.eye(6).repeat(4, 1)))
    (note,) = notes(result, "compensated")
    assert note.data["kept"] == {"0.weight": 4}
    assert "outputs for which nothing better than the nearest was found: 4 of 0.weight" in note.text
    plain = run(net, Quantize(bits=4, range="minmax"), task_of(torch.eye(6)))
    assert torch.equal(result.forms["0.weight"].decode(), plain.forms["0.weight"].decode())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_calibration_batch_that_is_not_finite_is_the_reason(value: float) -> None:
    """Not that the layer is odd."""
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(40, 6)
    x[3, 2] = value
    y = torch.zeros(40, dtype=torch.int64)
    on = Task("t", evaluate=[(torch.ones(40, 6), y)], calibrate=[(torch.ones(40, 6), y), (x, y)])
    result = run(net, Quantize(bits=4, rounding="gptq"), on)
    (found,) = result.ledger.notes("compensated")
    assert "its inputs or outputs are NaN or infinite" in found.text
