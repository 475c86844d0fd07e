"""Idle units: folding changes no output; only what is known to be constant or unread is touched."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from unit_cases import UNITS, net

from tersor.errors import RefusedError
from tersor.model import idle
from tersor.model.idle import clear


def every(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def biases(model: nn.Module) -> list[str]:
    return [name for name in every(model) if name.endswith("bias")]


def sparse(model: nn.Module, seed: int = 0, keep: float = 0.2) -> nn.Module:
    """Most weights zero, so that units without inputs or without readers are there."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g))
            if p.ndim > 1:
                p.mul_(torch.rand(p.shape, generator=g) < keep)
                p[torch.rand(len(p), generator=g) < 0.3] = 0
            elif name.endswith("weight"):
                p.abs_().add_(0.1)
    return model.eval()


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3)
    )


def conv(padding: int = 0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 7, 3, padding=padding), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(9), nn.ReLU(),
        nn.Linear(9, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.c(x + torch.tanh(self.b(x)))


CASES = {
    "mlp": (mlp, (5, 6)), "conv": (conv, (5, 2, 12, 12)), "padded": (lambda: conv(1), (5, 2, 12, 12)),
    "residual": (Residual, (5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CASES)
def test_the_network_computes_the_same(name, seed):
    make, shape = CASES[name]
    model, x = make(), torch.randn(shape)
    with torch.no_grad():
        model(x)  # lazy layers take their shape
        model = sparse(model, seed)
        before = model(x).clone()
        count = sum(int((p != 0).sum()) for p in model.parameters())
        changed = clear(model, (x,), every(model), biases(model))
        assert torch.allclose(model(x), before, atol=1e-5)
    assert changed, "no case of this seed is idle: the test shows nothing"
    assert sum(int((p != 0).sum()) for p in model.parameters()) < count
    assert not clear(model, (x,), every(model), biases(model)), "it was not done to the end"


def test_constants_are_folded_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.7
        weight, bias = model[2].weight.clone(), model[2].bias.clone()
    clear(model.eval(), (torch.randn(4, 2),), every(model), biases(model))
    constant = 1 / (1 + torch.exp(torch.tensor(-0.7)))
    assert torch.allclose(model[2].bias, bias + weight[:, 1] * constant)
    assert not model[2].weight[:, 1].any()
    assert model[0].bias[1] == 0  # nothing reads it any more
    assert torch.equal(model[2].weight[:, [0, 2]], weight[:, [0, 2]])


def test_a_bias_on_a_grid_takes_up_zeros_only():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([0.7, -0.7])  # after ReLU 0.7 and 0
    changed = clear(model.eval(), (torch.randn(4, 2),), every(model))
    assert set(changed) == {"0.bias", "2.weight"}
    assert model[2].weight[:, 0].all()
    assert not model[2].weight[:, 1].any()
    assert model[0].bias[:2].tolist() == [pytest.approx(0.7), 0.0]


def test_chains_of_idle_units_are_followed_to_the_end():
    layers = [layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model = sparse(nn.Sequential(*layers, nn.Linear(4, 2)), keep=1.0)
    with torch.no_grad():
        for layer in model[:-1:2]:
            layer.weight.copy_(torch.eye(4))
        model[-1].weight.fill_(1.0)
        model[-1].weight[:, 2] = 0  # nothing reads unit 2 at the end, so nothing on its way is needed
    clear(model, (torch.randn(3, 4),), every(model), biases(model))
    assert not any(layer.weight[2].any() or layer.bias[2] for layer in model[:-1:2])


class Masking(nn.Module):
    """A constant times something that depends on the input without being a float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x) * (x > 0))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.b(F.relu(self.a(self.embed(tokens)))).sum(1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_depends_without_saying_so_is_refused():
    model = Masking()
    with torch.no_grad():
        model.a.weight.zero_()
    with pytest.raises(RefusedError, match="gt gives something that is no float"):
        clear(model.eval(), (torch.randn(3, 4),), every(model), biases(model))


def test_a_model_that_cannot_be_traced_is_refused():
    with pytest.raises(RefusedError, match=r"torch\.fx cannot follow it"):
        clear(Branching().eval(), (torch.randn(3, 4),), [])


def test_tokens_are_no_constants():
    model = sparse(Tokens())
    with torch.no_grad():
        model.a.weight.normal_()
        model.a.weight[1] = 0
    x = torch.randint(9, (3, 5))
    before = model(x)
    changed = clear(model, (torch.full((3, 5), 2),), every(model), biases(model))  # all the same by chance
    assert "embed.weight" not in changed
    assert torch.allclose(model(x), before, atol=1e-5)


def test_a_layer_that_is_called_twice_is_left_alone():
    model = Twice()
    with torch.no_grad():
        model.a.weight[1] = 0
        model.b.weight[:, 2] = 0
    x = torch.randn(3, 4)
    before, weight = model(x), model.a.weight.clone()
    clear(model.eval(), (x,), every(model), biases(model))
    assert torch.equal(model.a.weight, weight)
    assert torch.allclose(model(x), before, atol=1e-6)


def test_parameters_that_are_not_named_are_left_alone():
    model = sparse(mlp())
    assert not clear(model, (torch.randn(3, 6),), ["0.weight", "2.weight"])  # their biases may not move


SETTINGS = {
    nn.Unflatten: (1, (2, 2, 4, 1)), nn.MaxPool1d: (2,), nn.AvgPool1d: (2,), nn.MaxPool2d: (2,),
    nn.AvgPool2d: (2,), nn.AdaptiveAvgPool1d: (1,), nn.AdaptiveAvgPool2d: (1,), nn.BatchNorm1d: (4,),
    nn.BatchNorm2d: (4,), nn.LayerNorm: (4,), nn.Softmax: (1,), nn.LogSoftmax: (1,),
}  # fmt: skip
SHAPES = {
    nn.Unflatten: (2, 16), nn.MaxPool1d: (2, 4, 4), nn.AvgPool1d: (2, 4, 4), nn.AdaptiveAvgPool1d: (2, 4, 4),
    nn.BatchNorm1d: (2, 4), nn.Dropout1d: (2, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", idle.PASSING_MODULES, ids=lambda kind: kind.__name__)
def test_every_passing_module_passes_nan_on(kind):
    module, shape = kind(*SETTINGS.get(kind, ())).eval(), SHAPES.get(kind, (2, 4, 4, 4))
    x = torch.randn(shape)
    module(x)
    for place in range(x.numel()):
        asked = x.clone()
        asked.view(-1)[place] = torch.nan
        assert module(asked).isnan().any(), place


@pytest.mark.parametrize("call", sorted(idle.PASSING_FUNCTIONS, key=lambda call: call.__name__),
                         ids=lambda call: call.__name__)  # fmt: skip
def test_every_passing_function_passes_nan_on(call):
    x = torch.full((2, 4, 4), torch.nan)
    name = call.__name__
    more = (2,) if "pool" in name else (1,) if "softmax" in name else ()
    more = (torch.zeros(4),) if name in ("add", "sub", "mul", "truediv") else more
    out = call([x, x]) if call is torch.cat else call(x, *more)
    assert out.isnan().all()


@pytest.mark.parametrize("name", sorted(idle.PASSING_METHODS))
def test_every_passing_method_passes_nan_on(name):
    x = torch.full((2, 4, 4), torch.nan)
    more = {
        "softmax": (1,), "view": (2, 16), "reshape": (2, 16), "transpose": (1, 2), "permute": (0, 2, 1),
        "unsqueeze": (1,), "unflatten": (1, (2, 2)), "add": (1,), "sub": (1,), "mul": (0,), "div": (2,),
    }  # fmt: skip
    assert getattr(x, name)(*more.get(name, ())).isnan().all()


# --- what only looks constant, or unread ---


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_every_kind_of_unit_computes_the_same(name, seed):
    make, shape, _ = UNITS[name]
    model = sparse(make(), seed).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    before = [out.clone() for out in tree_leaves(model(x))]
    try:
        clear(model, (x,), every(model), biases(model))
    except RefusedError:
        return
    for out, was in zip(tree_leaves(model(x)), before, strict=True):
        torch.testing.assert_close(out, was, rtol=1e-9, atol=1e-9)


def dropped(self, x):
    return self.b(F.dropout(self.a(x)))  # on, unless told otherwise


def added_to(self, x):
    y = self.a(x)
    y.add_(x)
    return self.b(y)


def added_in_place(self, x):
    y = z = self.a(x)
    y += x
    return self.b(z)


def clipped(self, x):
    return self.b(self.size(self.a(x)))


def times_turned(self, x):  # [B, T, I]
    y = self.a(x.transpose(0, 1)).transpose(0, 1)  # [B, T, U]
    return self.c(F.relu(self.b(y.transpose(1, 2))).flatten(1))  # from [B, U, T]


def hook(module, given, out):
    return torch.where(out == 0, given[0].mean(), out)


@pytest.mark.parametrize(
    ("forward", "layers", "shape"),
    [
        (dropped, {}, (5, 4)),
        (added_to, {}, (5, 4)),
        (added_in_place, {}, (5, 4)),
        (clipped, {"size": nn.Hardtanh()}, (1, 4)),
    ],
)
@torch.no_grad()
def test_what_only_looks_constant_stays(forward, layers, shape):
    model = net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2), **layers).eval()
    model.a.weight[1] = 0
    weight = model.b.weight.clone()
    for seed in range(8):  # by chance a constant falls out everywhere
        torch.manual_seed(seed)
        with suppress(RefusedError):
            clear(model, (torch.randn(shape),), every(model), biases(model))
    assert torch.equal(model.b.weight, weight)


@pytest.mark.parametrize("place", ["a", "relu", "b"])
@torch.no_grad()
def test_a_hook_may_do_anything(place):
    model = nn.Sequential()
    for name, layer in {"a": nn.Linear(4, 4), "relu": nn.ReLU(), "b": nn.Linear(4, 2)}.items():
        model.add_module(name, layer)
    model.a.weight[1] = 0
    model.a.bias[1] = -1
    if place == "b":
        model.b.register_forward_pre_hook(lambda module, given: hook(module, given, *given))
    else:
        model.get_submodule(place).register_forward_hook(hook)
    x = torch.randn(6, 4)
    before = model(x)
    clear(model.eval(), (x,), every(model), biases(model))
    torch.testing.assert_close(model(x), before)


@torch.no_grad()
def test_samples_that_lie_along_another_axis_are_refused():
    """With as many samples as times a unit of time 0 would be asked about only there, where nothing reads."""
    model = net(times_turned, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(16, 2)).eval()
    model.b.weight[:, 0] = 0
    for p in model.a.parameters():
        p[1:] = 0
    x = torch.randn(4, 4, 4)
    before = model(x)
    with pytest.raises(RefusedError, match="its samples depend on each other"):
        clear(model, (x,), every(model), biases(model))
    torch.testing.assert_close(model(x), before)
