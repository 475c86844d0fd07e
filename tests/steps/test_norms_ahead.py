"""Norms ahead: batch norms before their layers and scales after them are folded; outputs stay the same."""

from typing import Any

import pytest
import torch
from test_fold import EXACT, apart, facts, net, notes, scrambled, task_for
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.forms import LowRank
from tersor.model.output_comparison import judged
from tersor.model.task import Task
from tersor.steps import Factorize, Fold, Prune, Quantize


def norm_first(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.layer(self.norm(x)))


FIRST: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "linear": (nn.BatchNorm1d(5), nn.Linear(5, 7), (5,)),
    "linear no bias": (nn.BatchNorm1d(5), nn.Linear(5, 7, bias=False), (5,)),
    "conv1d": (nn.BatchNorm1d(3), nn.Conv1d(3, 6, 3), (3, 9)),
    "conv2d": (nn.BatchNorm2d(3), nn.Conv2d(3, 7, 3, 2, bias=False), (3, 9, 8)),
    "reflect": (nn.BatchNorm2d(3), nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect"), (3, 9, 8)),
    "point": (nn.BatchNorm2d(3), nn.Conv2d(3, 7, 1, padding="same"), (3, 9, 8)),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 6, 6)),
    "not affine": (nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 7, 3), (3, 9, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_a_norm_goes_into_the_layer_after_it(name: str) -> None:
    norm, layer, shape = FIRST[name]
    model = scrambled(net(norm_first, norm=norm, layer=layer))
    result = run(model, Fold(), task_for(*shape))
    assert type(result.model().get_submodule("norm")) is nn.Identity
    assert set(result.sites) == {"layer.weight", "layer.bias"}
    assert apart(result, model, *shape) < EXACT
    assert facts(result)["norms"] == 1


def test_a_norm_goes_into_all_that_read_it_and_the_norms_after_these_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.after(self.a(self.drop(h))).relu() + self.b(h)

    model = scrambled(
        net(
            forward, norm=nn.BatchNorm2d(3), drop=nn.Dropout2d(), a=nn.Conv2d(3, 4, 3, bias=False),
            b=nn.Conv2d(3, 4, 3), after=nn.BatchNorm2d(4),
        )
    )  # fmt: skip
    result = run(model, Fold(), task_for(3, 7, 7))
    assert facts(result)["norms"] == 2
    assert apart(result, model, 3, 7, 7) < EXACT


def test_zeros_around_an_image_keep_a_norm_with_a_shift() -> None:
    norm, layer = nn.BatchNorm2d(3), nn.Conv2d(3, 7, 3, padding=1)
    model = scrambled(net(norm_first, norm=norm, layer=layer))
    result = run(model, Fold(), task_for(3, 7, 7))
    assert "layer pads with zeros, and the norm has a shift" in notes(result, "left")[0]
    assert apart(result, model, 3, 7, 7) == 0
    with torch.no_grad():
        model.norm.bias.zero_()  # type: ignore[union-attr, operator]
        model.norm.running_mean.zero_()  # type: ignore[union-attr, operator]
    result = run(model, Fold(), task_for(3, 7, 7))
    assert facts(result)["norms"] == 1
    assert apart(result, model, 3, 7, 7) < EXACT


def in_a_row(self: Any, x: Tensor) -> Tensor:
    return self.layer(self.norm(x))


KEPT: dict[str, tuple[Any, nn.Module, tuple[int, ...], str]] = {
    "activation": (lambda self, x: self.layer(self.norm(x).relu()), nn.Linear(4, 3), (4,), "relu"),
    "also added": (lambda self, x: self.layer(h := self.norm(x)) + h, nn.Linear(4, 4), (4,), "add"),
    "another axis": (in_a_row, nn.Linear(6, 3), (4, 6), "reads another axis"),
    "turned": (in_a_row, nn.ConvTranspose1d(4, 3, 3), (4, 6), "transposed"),
    "read twice": (
        lambda self, x: self.layer(self.norm(x)) + self.layer(x), nn.Linear(4, 3), (4,), "elsewhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_norm_stays_where_anything_else_reads_it(name: str) -> None:
    forward, layer, shape, why = KEPT[name]
    model = scrambled(net(forward, norm=nn.BatchNorm1d(4), layer=layer))
    result = run(model, Fold(), task_for(*shape))
    assert type(result.model().get_submodule("norm")) is nn.BatchNorm1d
    assert why in notes(result, "left")[0].partition("after it:")[2]
    assert apart(result, model, *shape) == 0


class Scale(nn.Module):
    """As timm's and transformers' LayerScale."""

    def __init__(self, *shape: int, inplace: bool = False) -> None:
        super().__init__()
        self.gamma, self.inplace = nn.Parameter(torch.ones(shape)), inplace

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(1, -1, 1, 1) if x.ndim == 4 and self.gamma.ndim == 1 else self.gamma
        return x.mul_(gamma) if self.inplace else x * gamma


SCALED: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "tokens": (nn.Linear(5, 7), Scale(7), (4, 5)),
    "in place": (nn.Linear(5, 7, bias=False), Scale(7, inplace=True), (4, 5)),
    "maps": (nn.Conv2d(3, 7, 3, padding=1), Scale(7), (3, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), Scale(6, 1, 1), (4, 6, 6)),
    "turned": (nn.ConvTranspose2d(4, 6, 3, groups=2), Scale(6), (4, 5, 5)),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_goes_into_the_layer_before_it(name: str) -> None:
    layer, scale, shape = SCALED[name]
    model = scrambled(
        net(
            lambda self, x: self.scale(self.drop(self.layer(x))).relu(),
            layer=layer,
            drop=nn.Dropout(),
            scale=scale,
        )
    )
    result = run(model, Fold(), task_for(*shape))
    assert type(result.model().get_submodule("scale")) is nn.Identity
    assert set(result.sites) == {f"layer.{key}" for key in dict(layer.named_parameters())}
    assert apart(result, model, *shape) < EXACT
    assert facts(result)["scales"] == 1


@pytest.mark.parametrize("shape", [(1,), (4, 1), (4, 7)])
def test_a_scale_along_another_axis_stays(shape: tuple[int, ...]) -> None:
    model = scrambled(
        net(lambda self, x: self.scale(self.layer(x)), layer=nn.Linear(5, 7), scale=Scale(*shape))
    )
    result = run(model, Fold(), task_for(4, 5))
    assert facts(result)["scales"] == 0
    assert apart(result, model, 4, 5) == 0


def test_forms_that_hold_the_factors_take_them_and_others_stay() -> None:
    model = scrambled(net(norm_first, norm=nn.BatchNorm1d(16), layer=nn.Linear(16, 12)))
    pruned = run(model, [Prune(keep=0.5), Fold()], task_for(16))
    before = run(model, [Prune(keep=0.5)], task_for(16)).model()
    assert apart(pruned, before, 16) < EXACT
    assert facts(pruned)["norms"] == 1
    factors = run(model, [Factorize(rank=3), Fold()], task_for(16))
    assert isinstance(factors.forms["layer.weight"], LowRank)
    assert facts(factors)["norms"] == 1
    coarse = run(model, [Quantize(bits=4), Fold()], task_for(16))
    assert "the form of layer.weight cannot be scaled" in notes(coarse, "left")[0]


class Turned(nn.Conv2d):
    """A subclass that calls another operator."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight)


class Grouped(nn.Conv2d):
    """A subclass with groups and padding of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=0, groups=2)


def norm_last(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.layer(x))


@pytest.mark.parametrize("forward", [norm_first, norm_last])
def test_a_subclass_that_calls_another_operator_keeps_its_norm(forward: Any) -> None:
    norm = nn.BatchNorm2d(8 if forward is norm_first else 4)
    model = scrambled(net(forward, norm=norm, layer=Turned(4, 8, 3, bias=False)))
    result = run(model, Fold(), task_for(8, 6, 6))
    assert "layer calls conv_transpose2d, and not conv2d" in notes(result, "left")[0]
    assert apart(result, model, 8, 6, 6) == 0


@pytest.mark.parametrize("forward", [norm_first, norm_last])
def test_the_settings_of_the_call_are_used(forward: Any) -> None:
    norm = nn.BatchNorm2d(4 if forward is norm_first else 6)
    model = scrambled(net(forward, norm=norm, layer=Grouped(2, 6, 3, padding=1)))
    result = run(model, Fold(), task_for(4, 6, 6))
    assert facts(result)["norms"] == 1
    assert apart(result, model, 4, 6, 6) < EXACT


def test_a_subclass_that_pads_keeps_a_norm_with_a_shift() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, padding=1)

    model = scrambled(net(norm_first, norm=nn.BatchNorm2d(4), layer=Padded(4, 6, 3)))
    result = run(model, Fold(), task_for(4, 6, 6))
    assert "pads with zeros" in notes(result, "left")[0]
    assert apart(result, model, 4, 6, 6) == 0


def test_a_scale_of_a_wider_dtype_stays() -> None:
    model = scrambled(
        net(lambda self, x: self.scale(self.layer(x.float())), layer=nn.Linear(5, 7), scale=Scale(7))
    )
    model.layer.float()  # type: ignore[operator, union-attr]
    result = run(model, Fold(), task_for(4, 5))
    x = torch.randn(2, 4, 5)
    assert result.model()(x).dtype == model(x).dtype == torch.float64
    assert facts(result)["scales"] == 0


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(5, 7), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).to(self.dtype)


def test_the_proof_compares_dtypes() -> None:
    def made(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return Cast(dtype)

    batches = [(torch.randn(4, 5), torch.zeros(4).long())]
    task = Task("toy", evaluate=batches, calibrate=batches)
    for after, fits in ((torch.float64, True), (torch.float32, False)):
        found = judged(
            lambda: made(torch.float64), lambda kind=after: made(kind), lambda: made(torch.float64), task
        )
        assert found.fits == fits


def test_scales_that_stay_are_named() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.scale(self.layer(x)))

    model = scrambled(net(forward, layer=nn.Linear(5, 7), scale=Scale(7), last=nn.Linear(7, 3)))
    result = run(model, Fold(where="!layer.weight"), task_for(4, 5))
    assert "1 scales stay: scale: where leaves out layer.weight" in notes(result, "left")
