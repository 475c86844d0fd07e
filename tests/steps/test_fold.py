"""Fold: the same outputs in float64, for every input: borders, odd statistics, forms, shared layers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TensorBatches, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.history import replay, undo
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError
from tersor.forms import Affine, Codebook, Dense, LogGrid, LowRank, Masked, Sum
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.scaled_rows import multiplied, scaled
from tersor.model.task import Task
from tersor.steps import Cluster, Entropy, Factorize, Fold, Prune, Quantize

EXACT = 1e-11  # in float64, relative to the largest output


def task_for(*shape: int, dtype: torch.dtype = torch.float64) -> Task:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, *shape, generator=generator).to(dtype)
    y = torch.zeros(16, dtype=torch.int64)
    return Task("fold", evaluate=TensorBatches(x, y, batch=8), calibrate=[(x[:8], y[:8]), (x[8:], y[8:])])


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and statistics in float64, in eval mode; gammas of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
                if name.endswith("running_var"):
                    value.abs_().add_(0.05)
    return model.double().eval()


def apart(result: State, before: nn.Module, *shape: int, seed: int = 1, scale: float = 3.0) -> float:
    """The largest difference of outputs on fresh inputs, relative to the largest output."""
    x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed)).double() * scale
    with torch.no_grad():
        was, now = copy.deepcopy(before).double().eval()(x), result.model().double().eval()(x)
    assert was.shape == now.shape
    return float((was - now).abs().max() / was.abs().max())


def notes(result: State, kind: str) -> list[str]:
    return [entry.text for entry in result.ledger.notes(kind)]


def facts(result: State) -> dict[str, Any]:
    return dict(list(result.ledger.notes("folded"))[-1].data)


def net(forward: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


# Batch norms


def in_line(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(self.layer(x)))


PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 7), nn.BatchNorm1d(7), (5,)),
    "linear no bias": (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), (5,)),
    "conv1d": (nn.Conv1d(3, 6, 3, padding=2), nn.BatchNorm1d(6), (3, 9)),
    "conv2d": (nn.Conv2d(3, 7, 3, 2, 1, bias=False), nn.BatchNorm2d(7, eps=0.3), (3, 9, 8)),
    "reflect": (nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(7), (3, 9, 8)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 4, 4, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), (4, 6, 6)),
    "turned": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6), (4, 5, 5)),
    "turned, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (4, 5, 5)),
    "not affine": (nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7, affine=False), (3, 9, 8)),
}  # fmt: skip


@pytest.mark.sampled("name")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PAIRS)
def test_a_norm_goes_into_the_layer_before_it(name: str, seed: int) -> None:
    layer, norm, shape = copy.deepcopy(PAIRS[name])
    model = scrambled(net(in_line, layer=layer, norm=norm), seed)
    if norm.affine:
        with torch.no_grad():
            norm.weight[1] = 0
    result = run(model, Fold(), task_for(*shape))
    assert type(result.model().get_submodule("norm")) is nn.Identity
    assert set(result.sites) == {"layer.weight", "layer.bias"}
    assert apart(result, model, *shape) < EXACT
    assert facts(result)["norms"] == 1


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_of_a_shared_head_goes_into_its_layer_once(bias: bool) -> None:
    model = scrambled(net(on_two_levels, layer=nn.Conv2d(2, 4, 3, bias=bias), norm=nn.BatchNorm2d(4)))
    result = run(model, Fold(), task_for(2, 9, 9))
    assert type(result.model().get_submodule("norm")) is nn.Identity
    assert apart(result, model, 2, 9, 9) < EXACT
    assert facts(result)["norms"] == 1


@pytest.mark.extra
@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_a_norm_of_timm_leaves_its_activation(act: type[nn.Module], tmp_path: Path) -> None:
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(4, act_layer=act, inplace=False)
    model = scrambled(net(lambda self, x: self.norm(self.layer(x)), layer=nn.Conv2d(2, 4, 3), norm=norm))
    result = run(model, Fold(), task_for(2, 9, 9))
    assert [type(part) for part in result.model().get_submodule("norm")] == [nn.Identity, act]
    assert {site.split(".")[0] for site in result.sites if ".act." not in site} == {"layer"}
    assert apart(result, model, 2, 9, 9) < EXACT
    assert facts(result)["norms"] == 1
    save(result, tmp_path / "a.tersor")
    again = load(tmp_path / "a.tersor").on(model)
    assert apart(again, model, 2, 9, 9) < EXACT


class ReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y) + y.relu()


def called_twice(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.layer(self.norm(self.first(x))))


def layer_twice(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.layer(F.relu(self.layer(x))))


def on_two_levels(self: Any, x: Tensor) -> Tensor:
    """A head that the levels of a pyramid share, as in RetinaNet and FCOS."""
    return torch.cat([self.norm(self.layer(level)).relu().flatten(1) for level in (x, x[..., ::2, ::2])], 1)


def on_one_level(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.layer(x)) + self.layer(x.flip(3))


def before_it(self: Any, x: Tensor) -> Tensor:
    return self.layer(self.norm(x))


def over_tokens(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.layer(x))


def hooked() -> nn.Module:
    model = net(in_line, layer=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4))
    model.layer.register_forward_hook(lambda module, args, out: out * 2)
    return model


def tied() -> nn.Module:
    model = net(
        lambda self, x: self.other(F.relu(self.norm(self.layer(x)))),
        layer=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), other=nn.Conv2d(4, 4, 3),
    )  # fmt: skip
    model.other.weight = model.layer.weight
    return model


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() + 1


def conv4() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "read elsewhere": (ReadElsewhere, (2, 5, 5), "the output of layer is read elsewhere too"),
    "norm twice": (
        lambda: net(called_twice, first=conv4(), layer=conv4(), norm=nn.BatchNorm2d(4)), (4, 5, 5),
        "called 2 times",
    ),
    "layer twice": (
        lambda: net(layer_twice, layer=conv4(), norm=nn.BatchNorm2d(4)), (4, 5, 5), "used elsewhere"
    ),
    "a level without": (
        lambda: net(on_one_level, layer=conv4(), norm=nn.BatchNorm2d(4)), (4, 5, 5), "used elsewhere"
    ),
    "before": (lambda: net(before_it, layer=conv4(), norm=nn.BatchNorm2d(4)), (4, 5, 5), "and not a linear"),
    "tokens": (
        lambda: net(over_tokens, layer=nn.Linear(4, 6), norm=nn.BatchNorm1d(5)), (5, 4), "holds no outputs"
    ),
    "batch statistics": (
        lambda: net(in_line, layer=conv4(), norm=nn.BatchNorm2d(4, track_running_stats=False)), (4, 5, 5),
        "statistics of the batch",
    ),
    "hook": (hooked, (2, 5, 5), "layer has a hook"),
    "tied": (tied, (4, 7, 7), "layer.weight is used elsewhere too"),
    "own class": (lambda: net(in_line, layer=conv4(), norm=OwnNorm(4)), (4, 5, 5), "may do more"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_norm_that_cannot_be_folded_stays_and_a_note_says_why(name: str) -> None:
    make, shape, why = KEPT[name]
    model = scrambled(make())
    result = run(model, Fold(), task_for(*shape))
    assert type(result.model().get_submodule("norm")) is type(model.norm)
    (note,) = notes(result, "left")
    assert why in note
    assert apart(result, model, *shape) == 0
    assert facts(result) == {"norms": 0, "scales": 0, "units": 0, "before": facts(result)["after"],
                             "after": sum(p.numel() for p in set(model.parameters()))}  # fmt: skip


def test_a_fold_whose_rounding_is_large_is_not_made() -> None:
    model = scrambled(net(in_line, layer=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4))).bfloat16()
    task = task_for(2, 5, 5, dtype=torch.bfloat16)
    result = run(model, Fold(), task)
    assert type(result.model().get_submodule("norm")) is nn.BatchNorm2d
    assert "its rounding changes the outputs by" in notes(result, "left")[0]
    assert result.digest == run(model, Fold(norms=False), task).digest


def test_rounding_that_shows_in_small_outputs_alone_is_allowed() -> None:
    """The executor's proof compares the smallest elements, in which large terms of float32 cancel."""
    model = scrambled(net(over_tokens, layer=nn.Linear(6, 64), norm=nn.BatchNorm1d(64))).float()
    with torch.no_grad():
        model.norm.weight[::2] *= 100
    result = run(model, Fold(), task_for(6, dtype=torch.float32))
    assert notes(result, "refused")
    assert facts(result)["norms"] == 1
    assert notes(result, "rounded")[0].endswith("of the largest, as by float rounding")
    assert 1e-9 < apart(result, model, 6) < 1e-6


def test_where_leaves_layers_alone() -> None:
    model = scrambled(nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))  # fmt: skip
    result = run(model, Fold(where="0.*"), task_for(2, 7, 7))
    after = result.model()
    assert isinstance(after[1], nn.Identity)
    assert isinstance(after[4], nn.BatchNorm2d)
    assert torch.equal(after[3].weight, model[3].weight)
    assert apart(result, model, 2, 7, 7) < EXACT


def test_frozen_tensors_stay_frozen() -> None:
    model = scrambled(net(in_line, layer=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4)))
    model.layer.weight.requires_grad_(False)
    result = run(model, Fold(), task_for(2, 5, 5))
    assert not result.model().layer.weight.requires_grad
    assert apart(result, model, 2, 5, 5) < EXACT


# Forms of scaled weights


def grids(w: Tensor, axis: int) -> dict[str, Any]:
    """Forms of about this weight, by hand: integer codes with scales of each kind."""
    rows = w.movedim(axis, 0)
    count, columns = len(rows), rows[0].numel()
    codes = (w * 20).round().clamp(-100, 100).to(torch.int8)
    scale = torch.rand(count, 1) + 0.1
    zero = torch.randint(-20, 20, (count, 1), dtype=torch.int16)
    index = torch.randint(0, 4, w.shape, dtype=torch.uint8)
    small = (w * 3).round().clamp(-7, 7).to(torch.int8)
    return {
        "dense": Dense(w),
        "masked": Masked(Dense(w > 0), Dense(w)),
        "affine": Affine(Dense(codes), Dense(scale), None, 8, 0, axis),
        "one scale": Affine(Dense(codes), Dense(scale[:1]), None, 8, 0, axis),
        "asymmetric": Affine(Dense(codes), Dense(scale), Dense(zero), 8, 0, axis),
        "one zero": Affine(Dense(codes), Dense(scale[:1]), Dense(zero[:1]), 8, 0, axis),
        "groups": Affine(Dense(codes), Dense(torch.rand(count, -(-columns // 2))), None, 8, 2, axis),
        "masked affine": Masked(Dense(w > 0), Affine(Dense(codes), Dense(scale), None, 8, 0, axis)),
        "loggrid": LogGrid(Dense(small), Dense(scale), 4, 1, 0, axis),
        "codebook": Codebook(Dense(index), Dense(torch.randn(4)), None, axis),
        "codebook, scaled": Codebook(Dense(index), Dense(torch.randn(4)), Dense(scale), axis),
        "codebooks": Codebook(Dense(index), Dense(torch.randn(count, 4)), None, axis),
        "sum": Sum(Dense(w), Masked(Dense(w > 0), Dense(w))),
    }


@given(
    st.sampled_from([(4, 5), (1, 3), (3, 1), (3, 4, 3), (2, 3, 2, 2)]), st.integers(0, 1),
    st.integers(0, 10**6),
)  # fmt: skip
@settings(deadline=None)
def test_scaled_forms_decode_to_scaled_weights(shape: tuple[int, ...], axis: int, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        w, factor = torch.randn(shape), torch.randn(shape[axis]).double()
        factor[torch.rand(len(factor)) < 0.2] = 0
        wide = factor.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        left, right = torch.randn(shape[0], 2), torch.randn(2, *shape[1:])
        found = grids(w, axis) | {"lowrank": LowRank(Dense(left), Dense(right))}
        for name, form in found.items():
            after = scaled(form, factor, axis)
            assert after is not None, name
            wanted = form.decode().double() * wide
            assert torch.allclose(after.decode().double(), wanted, rtol=1e-5, atol=1e-5), name
            assert after.decode().dtype == form.decode().dtype
            assert {n.name for _, n in form.walk()} <= {n.name for _, n in after.walk()}
        assert scaled(found["affine"], torch.ones(shape[1 - axis]).double(), 1 - axis) is None
        both = multiplied(found["masked"], wide * 2)
        assert both is not None
        assert torch.allclose(both.decode().double(), found["masked"].decode() * wide * 2, rtol=1e-6)
        assert multiplied(found["affine"], wide) is None


def test_a_code_without_a_negative_counterpart_is_left() -> None:
    codes = torch.tensor([[-128, 5], [3, 4]], dtype=torch.int8)
    form = Affine(Dense(codes), Dense(torch.ones(2, 1)))
    assert scaled(form, torch.tensor([-1.0, 1.0]).double(), 0) is None
    zero = Dense(torch.tensor([[-128], [127]], dtype=torch.int16))
    found = scaled(form.replace(zero=zero), torch.tensor([-1.0, -0.5]).double(), 0)
    assert found is not None
    assert found.decode().tolist() == [[0, -133], [62, 61.5]]


STORED = {
    "pruned": [Prune(keep=0.4)],
    "symmetric": [Quantize(bits=8)],
    "asymmetric": [Quantize(bits=6, symmetric=False, per="group", group=4)],
    "pruned, quantized": [Prune(keep=0.4), Quantize(bits=8)],
    "clustered": [Cluster(entries=6)],
    "factorized": [Factorize(rank=2)],
    "coded": [Prune(keep=0.4), Quantize(bits=5), Entropy()],
}


@pytest.mark.parametrize("name", STORED)
def test_a_norm_is_folded_into_stored_forms(name: str) -> None:
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False)
    model = scrambled(nn.Sequential(*layers, nn.BatchNorm2d(5))).float()
    task = task_for(3, 7, 7, dtype=torch.float32)
    before = run(model, STORED[name], task)
    result = run(before, Fold(), task)
    assert facts(result)["norms"] == 2, notes(result, "left")
    assert apart(result, before.model(), 3, 7, 7) < 1e-6
    old, new = ({n.name for _, n in s.forms["0.weight"].walk()} for s in (before, result))
    assert old <= new
    if "pruned" in name:
        masks = [s.forms["3.weight"].keep.decode() for s in (before, result)]
        assert not (masks[1] & ~masks[0]).any()


# Dead units


def emptied(model: nn.Module, seed: int, rows: float = 0.3, columns: float = 0.3) -> nn.Module:
    """Some rows and columns of all weights are zero."""
    model, generator = scrambled(model, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_((torch.rand(p.shape, generator=generator) < 0.7).double())
                p[torch.rand(len(p), generator=generator) < rows] = 0
                p[:, torch.rand(p.shape[1], generator=generator) < columns] = 0
    return model


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3)
    )


def conv(padding: int = 1, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 10, 3, padding=padding, bias=bias), nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 9, 3, padding=padding, bias=bias), nn.Sigmoid(),
        nn.Conv2d(9, 8, 3, padding=padding, bias=bias), nn.Flatten(), nn.LazyLinear(9), nn.ReLU(),
        nn.Linear(9, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), conv8()
        self.n1, self.n2, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(self.stem(x)).relu()
        x = x + self.n2(self.b(self.a(x).relu()))
        return self.head(x.relu().mean((2, 3)))


def conv8() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1, bias=False)


class Mobile(nn.Module):
    """Inverted bottlenecks with depthwise and grouped convolutions, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.n1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.n2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.down, self.n3 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.turned = nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.n2(self.deep(F.relu6(self.n1(self.up(x))))))
        x = self.turned(self.grouped(self.n3(self.down(x)).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)), "conv": (lambda: conv(0), (2, 16, 16)), "padded": (conv, (2, 10, 10)),
    "no bias": (lambda: conv(1, False), (2, 10, 10)), "residual": (Residual, (2, 6, 6)),
    "mobile": (Mobile, (3, 6, 6)),
}  # fmt: skip


@pytest.mark.sampled("name")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETS)
def test_sparse_networks_get_smaller_and_compute_the_same(name: str, seed: int) -> None:
    make, shape = NETS[name]
    task, model = task_for(*shape), make().double()
    with torch.no_grad():
        model(task.calibrate[0][0])  # initializes lazy layers
    model = emptied(model, seed)
    result = run(model, Fold(), task)
    assert apart(result, model, *shape) < EXACT
    assert facts(result)["units"] > 0, notes(result, "refused")
    assert not notes(result, "refused")
    assert not notes(result, "void")
    again = run(result, Fold(), task)
    assert facts(again) | {"before": 0} == {"norms": 0, "scales": 0, "units": 0, "before": 0,
                                            "after": facts(result)["after"]}  # fmt: skip


@pytest.mark.wide
@given(
    st.integers(0, 10**6), st.tuples(st.floats(0.0, 0.8), st.floats(0.0, 0.8)),
    st.sampled_from(["mlp", "padded", "residual"]), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_any_zeros(seed: int, shares: tuple[float, float], name: str, norms: bool, merge: bool) -> None:
    (make, shape), (rows, columns) = NETS[name], shares
    task, model = task_for(*shape), make().double()
    with torch.no_grad():
        model(task.calibrate[0][0])
    model = emptied(model, seed, rows, columns)
    result = run(model, Fold(norms=norms, merge=merge), task)
    with torch.no_grad():
        x = torch.randn(8, *shape).double()
        was, now = model(x), result.model()(x)
    assert torch.allclose(now, was, rtol=EXACT, atol=EXACT * float(was.abs().max()) + 1e-300)
    assert not notes(result, "refused")


def test_constants_by_hand() -> None:
    """Unit 1 is sigmoid(0.7) always; unit 2 is read by nobody; unit 4 reads only dead units of its own."""
    layers = nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    model = scrambled(nn.Sequential(*layers))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0.7
        model[2].weight[:, 2] = 0
        model[2].weight[3] = 0  # unit 3 of the second layer reads unit 4 alone, and nobody reads it
        model[2].weight[:, 4] = 0
        model[2].weight[3, 4] = 1.0
        model[4].weight[:, 3] = 0
    result = run(model, Fold(), task_for(4))
    after = result.model()
    kept, second = [0, 3, 5], [0, 1, 2, 4]
    assert torch.equal(after[0].weight, model[0].weight[kept])
    wanted = model[2].bias + model[2].weight[:, 1] / (1 + torch.exp(torch.tensor(-0.7).double()))
    assert torch.allclose(after[2].bias, wanted[second], rtol=1e-14)
    assert torch.equal(after[2].weight, model[2].weight[second][:, kept])
    assert torch.equal(after[4].weight, model[4].weight[:, second])
    assert (after[0].out_features, after[2].in_features, after[4].in_features) == (3, 3, 4)
    assert apart(result, model, 4) < EXACT


def padded() -> nn.Module:
    """Channels 1, 3 and 4 of six are constants 2, -0.5 and 3 after the activation."""
    model = scrambled(nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ELU(), nn.Conv2d(6, 4, 3, padding=1)))
    with torch.no_grad():
        for channel, bias in {1: 2.0, 3: -0.6931471805599453, 4: 3.0}.items():
            model[0].weight[channel], model[0].bias[channel] = 0, bias
    return model


def test_padding_merges_constants_into_one_channel() -> None:
    model, x = padded(), torch.randn(4, 2, 5, 5).double()
    result = run(model, Fold(), task_for(2, 5, 5))
    after = result.model()
    assert after[0].out_channels == 4
    assert [int(k) for k in result.kept["0.weight"][0]] == [0, 2, 4, 5]
    w = model[2].weight.detach()
    assert torch.allclose(after[2].weight[:, 2], w[:, 4] + w[:, 1] * 2 / 3 - w[:, 3] * 0.5 / 3, rtol=1e-12)
    assert apart(result, model, 2, 5, 5) < EXACT
    naive = copy.deepcopy(model)  # what would be right without padding is wrong at the border
    with torch.no_grad():
        for channel, c in {1: 2.0, 3: -0.5, 4: 3.0}.items():
            naive[2].bias += naive[2].weight[:, channel].sum((1, 2)) * c
            naive[2].weight[:, channel] = 0
        wrong = (naive(x) - model(x)).abs()
        assert wrong[:, :, 1:-1, 1:-1].max() < 1e-12 * model(x).abs().max() + 1e-11
        assert wrong[:, :, 0].max() > 0.1


def test_constants_under_padding_stay_without_merge() -> None:
    model = padded()
    result = run(model, Fold(merge=False), task_for(2, 5, 5))
    assert result.model()[0].out_channels == 6
    assert torch.equal(result.model()[2].weight, model[2].weight)


def test_a_merged_column_may_widen_a_mask() -> None:
    model = padded()
    with torch.no_grad():
        model[2].weight[0, 4] = 0  # pruned in the channel that stays, not in one that is merged
        model[2].weight[1] = 0
    begin = run(model, Prune(threshold=1e-9), task_for(2, 5, 5))
    assert isinstance(begin.forms["2.weight"], Masked)
    result = run(begin, Fold(), task_for(2, 5, 5))
    assert result.model()[0].out_channels == 4
    form = result.forms["2.weight"]
    assert isinstance(form, Masked)
    assert form.keep.decode()[0, 2].all()
    assert not form.keep.decode()[1].any()
    assert apart(result, model, 2, 5, 5) < EXACT


def test_a_channel_of_a_stream_stays_while_anything_makes_it() -> None:
    model = scrambled(Residual())
    with torch.no_grad():
        for channel in (2, 5):
            model.stem.weight[channel] = model.stem.bias[channel] = 0
            model.n1.bias[channel] = -5
            model.n1.running_mean[channel] = 0
        model.b.weight[5] = 0  # only channel 5 gets nothing from the block either
        model.n2.bias[5] = model.n2.running_mean[5] = 0
    result = run(model, Fold(), task_for(2, 6, 6))
    assert result.model().head.in_features == 7
    assert result.kept["head.weight"][1] == (0, 1, 2, 3, 4, 6, 7)
    assert apart(result, model, 2, 6, 6) < EXACT


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 6), nn.GroupNorm(2, 6), nn.LayerNorm([6, 5, 5])])
def test_units_that_a_normalizer_counts_stay(norm: nn.Module) -> None:
    model = scrambled(nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(6, 4, 3)))
    with torch.no_grad():
        model[0].weight[1] = model[0].bias[1] = 0
        model[3].weight[:, 1] = model[3].weight[:, 2] = 0
    result = run(model, Fold(), task_for(2, 5, 5))
    assert result.model()[0].out_channels == 6
    assert apart(result, model, 2, 5, 5) < EXACT


def test_a_unit_that_only_a_sum_reads_stays() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x) + x.sum(1, keepdim=True)

    model = scrambled(net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    with torch.no_grad():
        model.b.weight[:, [1, 2]] = 0
        model.a.weight[2] = model.a.bias[2] = 0
    result = run(model, Fold(), task_for(4))
    assert result.kept["b.weight"][1] == (0, 1, 3, 4, 5)
    assert apart(result, model, 4) < EXACT


@pytest.mark.parametrize("padding", [0, 1])
def test_constants_of_two_groups_are_not_merged(padding: int) -> None:
    last = nn.Conv2d(6, 4, 3, padding=padding, groups=2)
    model = scrambled(nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ELU(), last))
    with torch.no_grad():
        for channel, bias in {1: 2.0, 4: 3.0}.items():
            model[0].weight[channel], model[0].bias[channel] = 0, bias
    result = run(model, Fold(), task_for(2, 5, 5))
    assert not notes(result, "refused")
    assert apart(result, model, 2, 5, 5) < EXACT


def test_depthwise_channels_go_with_the_channels_around_them() -> None:
    model = scrambled(Mobile())
    with torch.no_grad():
        model.down.weight[:, 3] = model.down.weight[:, 7] = 0
    result = run(model, Fold(), task_for(3, 6, 6))
    after = result.model()
    assert (after.up.out_channels, after.deep.groups, after.down.in_channels) == (10, 10, 10)
    assert apart(result, model, 3, 6, 6) < EXACT


def test_at_least_two_units_stay() -> None:
    model = scrambled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    with torch.no_grad():
        model[2].weight.zero_()
    result = run(model, Fold(), task_for(4))
    assert result.model()[0].out_features == 2
    assert apart(result, model, 4) < EXACT


def test_unread_inputs_are_counted() -> None:
    model = scrambled(nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)))
    with torch.no_grad():
        model[1].weight[:, [0, 5, 7]] = 0
        model[1].weight[1] = 0
        model[1].weight[1, 5] = 1.0  # read by unit 1 alone, which nobody reads
        model[3].weight[:, 1] = 0
    result = run(model, Fold(), task_for(3, 4))
    (entry,) = result.ledger.notes("unread")
    assert "3 of 12 inputs" in entry.text
    assert dict(entry.data) == {"inputs": 3, "parameters": 15}


def test_where_keeps_units_of_other_layers() -> None:
    model = scrambled(mlp())
    with torch.no_grad():
        model[2].weight[:, 3] = 0
        model[6].weight[:, 3] = 0
    result = run(model, Fold(where=("0.*", "2.*")), task_for(6))
    after = result.model()
    assert (after[0].out_features, after[4].out_features) == (11, 8)
    assert torch.equal(after[4].weight, model[4].weight)
    assert apart(result, model, 6) < EXACT


CODES = {
    "masked, symmetric": ([Prune(keep=0.15, per="tensor"), Quantize(bits=8)], True),
    "masked, asymmetric": ([Prune(keep=0.15, per="tensor"), Quantize(bits=6, symmetric=False)], True),
    "coded": ([Prune(keep=0.15, per="tensor"), Cluster(entries=4), Entropy()], True),
    "symmetric": ([Quantize(bits=2, symmetric=True)], True),
}


@pytest.mark.parametrize("name", CODES)
def test_dead_units_of_quantized_weights_go(name: str) -> None:
    steps, cut = CODES[name]
    model = scrambled(mlp()).float()
    with torch.no_grad():
        model[0].weight[4] = model[4].weight[:, 2] = 0
        model[2].weight[3] = 0
    task = task_for(6, dtype=torch.float32)
    before = run(model, steps, task)
    result = run(before, Fold(), task)
    assert (facts(result)["units"] > 0) == cut
    assert apart(result, before.model(), 6) < 1e-6
    old, new = ({n.name for _, n in s.forms["2.weight"].walk()} for s in (before, result))
    assert old - {"coded"} == new - {"coded"}


def test_pruned_folded_saved_loaded_undone(tmp_path: Path) -> None:
    t = tiny("conv")
    steps = [Prune(keep=0.1, per="global"), Fold(), Quantize(), Entropy()]
    result = run(t.model, steps, t.task, journal=tmp_path / "journal")
    pruned = run(t.model, steps[:1], t.task)
    folded = undo(result, 2, journal=tmp_path / "journal")
    assert facts(folded)["norms"] == 2
    assert apart(folded, pruned.model(), 1, 6, 6) < 1e-6
    assert undo(result, 3, journal=tmp_path / "journal").digest == pruned.digest
    assert torch.equal(undo(result).model().stem.weight, t.model.stem.weight)
    assert replay(t.model, result.ledger, tmp_path / "journal").digest == result.digest
    save(result, tmp_path / "small.tersor")
    again = load(tmp_path / "small.tersor")
    assert again.digest == result.digest
    fresh = tiny("conv", seed=9).model
    assert torch.equal(again.model(fresh).eval()(t.x), result.model().eval()(t.x))


def test_a_recurrent_layer_is_left_with_a_note() -> None:
    t = tiny("lstm")
    with torch.no_grad():
        t.model.head.weight[:, 2] = 0
    result = run(t.model, Fold(), t.task)
    assert facts(result)["units"] == 0
    assert torch.equal(t.out(result.model()), t.out())
    said = {entry.site for entry in result.ledger.entries if entry.kind == "skipped"}
    assert {"cell.weight_ih_l0", "head.weight"} <= said


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


@pytest.mark.parametrize("norms", [True, False])
def test_a_model_without_a_graph_is_refused(norms: bool) -> None:
    model = scrambled(Untraceable())
    with torch.no_grad():
        model.fc.weight[0] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RefusedError, match="fold: it needs the graph of the forward: torch.export cannot"):
        run(model, Fold(norms=norms), task_for(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.a(x).relu())


def test_a_model_that_cannot_be_followed_keeps_its_dead_units_with_a_note() -> None:
    model = scrambled(Counting())
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    result = run(model, Fold(), task_for(4))
    assert facts(result)["units"] == 0
    assert result.model().a.out_features == 6
    assert any("dead units are not looked for: its forward writes to" in t for t in notes(result, "skipped"))


def test_a_random_model_keeps_its_units() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + 1e-9 * torch.rand_like(self.a(x)))

    model = scrambled(net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    assert facts(run(model, Fold(), task_for(4)))["units"] == 0


def test_settings() -> None:
    with pytest.raises(SettingError, match="leave nothing to do"):
        Fold(norms=False, dead=False)
    with pytest.raises(SettingError, match="merge=False has no effect if dead=False"):
        Fold(merge=False, dead=False)
