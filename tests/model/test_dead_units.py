"""Dead units: folding changes no output, and only units known to be constant or unread change."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from unit_cases import UNITS, net

from tersor.errors import RefusedError
from tersor.model import graph, nan_propagation
from tersor.model.dead_units import clear
from tersor.model.nan_propagation import Followed


def every(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def biases(model: nn.Module) -> list[str]:
    return [name for name in every(model) if name.endswith("bias")]


def sparse(model: nn.Module, seed: int = 0, keep: float = 0.2) -> nn.Module:
    """Set most weights to zero, so that some units have no inputs or no readers."""
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
        model(x)  # initializes lazy layers
        model = sparse(model, seed)
        before = model(x).clone()
        count = sum(int((p != 0).sum()) for p in model.parameters())
        changed = clear(model, (x,), every(model), biases(model))
        assert torch.allclose(model(x), before, atol=1e-5)
    assert changed, "no unit is dead with this seed, so the test shows nothing"
    assert sum(int((p != 0).sum()) for p in model.parameters()) < count
    assert not clear(model, (x,), every(model), biases(model)), "a second call still finds dead units"


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
    assert model[0].bias[1] == 0  # no layer reads it any more
    assert torch.equal(model[2].weight[:, [0, 2]], weight[:, [0, 2]])


def test_a_bias_that_may_not_move_takes_up_only_zeros():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([0.7, -0.7])  # after ReLU 0.7 and 0
    changed = clear(model.eval(), (torch.randn(4, 2),), every(model))
    assert set(changed) == {"0.bias", "2.weight"}
    assert model[2].weight[:, 0].all()
    assert not model[2].weight[:, 1].any()
    assert model[0].bias[:2].tolist() == [pytest.approx(0.7), 0.0]


def test_chains_of_dead_units_are_followed_to_the_end():
    layers = [layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model = sparse(nn.Sequential(*layers, nn.Linear(4, 2)), keep=1.0)
    with torch.no_grad():
        for layer in model[:-1:2]:
            layer.weight.copy_(torch.eye(4))
        model[-1].weight.fill_(1.0)
        model[-1].weight[:, 2] = (
            0  # no output reads unit 2 of the last layer, so unit 2 is dead in every layer
        )
    clear(model, (torch.randn(3, 4),), every(model), biases(model))
    assert not any(layer.weight[2].any() or layer.bias[2] for layer in model[:-1:2])


class Masking(nn.Module):
    """A constant times a boolean tensor that depends on the input."""

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


def test_integers_and_masks_that_depend_on_the_input_are_no_constants():
    model = Masking()
    with torch.no_grad():
        model.a.weight.zero_()
    x = torch.randn(3, 4).abs()  # x > 0 is the same everywhere in this example
    weight = model.b.weight.clone()
    clear(model.eval(), (x,), every(model), biases(model))
    assert torch.equal(model.b.weight, weight)


def test_a_model_that_cannot_be_traced_is_refused():
    with pytest.raises(RefusedError, match=r"torch\.export cannot trace the model"):
        clear(Branching().eval(), (torch.randn(3, 4),), [])


def test_tokens_are_no_constants():
    model = sparse(Tokens())
    with torch.no_grad():
        model.a.weight.normal_()
        model.a.weight[1] = 0
    x = torch.randint(9, (3, 5))
    before = model(x)
    changed = clear(model, (torch.full((3, 5), 2),), every(model), biases(model))  # all tokens equal
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


# --- what only looks constant, or unread ---


@pytest.mark.sampled("name")
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
    return self.b(F.dropout(self.a(x)))  # training=True is the default


def added_to(self, x):
    y = self.a(x)
    y.add_(x)
    return self.b(y)


def added_in_place(self, x):
    y = z = self.a(x)
    y += x
    return self.b(z)


def unlisted(self, x):
    return self.b(torch.sinh(self.a(x)))


def written_to_a_view(self, x):
    y = self.a(x)
    y.view(-1).add_(x.sum())
    return self.b(y)


def written_as_other(self, x):
    y = self.a(x)
    y.masked_fill_(x > 0, 1.0)
    return self.b(y)


def times_turned(self, x):  # [B, T, I]
    y = self.a(x.transpose(0, 1)).transpose(0, 1)  # [B, T, U]
    return self.c(F.relu(self.b(y.transpose(1, 2))).flatten(1))  # from [B, U, T]


def hook(module, given, out):
    return torch.where(out == 0, given[0].mean(), out)


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (dropped, (5, 4)),
        (added_to, (5, 4)),
        (added_in_place, (5, 4)),
        (written_to_a_view, (5, 4)),
        (written_as_other, (5, 4)),
        (unlisted, (1, 4)),
    ],
)
@torch.no_grad()
def test_units_that_only_seem_constant_stay(forward, shape):
    model = net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2)).eval()
    model.a.weight[1] = 0
    weight = model.b.weight.clone()
    for seed in range(8):  # dropout may clear a whole constant by chance
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
def test_samples_may_lie_along_another_axis():
    """With as many samples as time steps, the two axes could be mixed up; no layer reads time step 0."""
    model = net(times_turned, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(16, 2)).eval()
    model.b.weight[:, 0] = 0
    for p in model.a.parameters():
        p[1:] = 0
    x = torch.randn(4, 4, 4)
    before = model(x)
    clear(model, (x,), every(model), biases(model))
    torch.testing.assert_close(model(x), before)
    assert model.a.weight[0].any()


def rolled(self, x):  # the larger one in the example is never that of `a`, which so has no gradient
    return self.b(torch.maximum(F.relu(self.a(x)).roll(1, 0), torch.full_like(x, 100)))


@torch.no_grad()
def test_samples_that_depend_on_each_other_are_refused():
    model = net(rolled, a=nn.Linear(4, 4), b=nn.Linear(4, 2)).eval()
    for p in model.a.parameters():
        p[1:] = 0
    with pytest.raises(RefusedError, match="its samples depend on each other"):
        clear(model, (torch.randn(4, 4),), every(model), biases(model))


# --- what has a gradient is read: no pass with NaN for it ---


def test_few_units_are_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a clip silences on the example is no candidate either. The unread one is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 300), nn.ReLU6(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 2)
    ).eval()
    with torch.no_grad():
        model[0].bias[:50] = -100
        model[2].weight[:, 7] = 0
    x = torch.randn(5, 4)
    before, tried = model(x), []
    outputs = Followed.outputs

    def counted(self: Any, leaves: Any, on_product: Any, at: Any = None) -> Any:
        tried.append(at)
        return outputs(self, leaves, on_product, at)

    monkeypatch.setattr(Followed, "outputs", counted)
    changed = clear(model, (x,), every(model), biases(model))
    assert set(changed) == {"0.weight", "0.bias"}
    assert not model[0].weight[7].any()
    assert model[0].weight.any(1).sum() == 299
    torch.testing.assert_close(model(x), before)
    assert sum(at is not None for at in tried) < 10


def steps(self, x):
    return self.b(F.relu(self.a(x))) + torch.heaviside(self.c(x), torch.zeros(()))


@torch.no_grad()
def test_an_operator_without_a_derivative():
    model = net(steps, a=nn.Linear(4, 6), b=nn.Linear(6, 2), c=nn.Linear(4, 2)).eval()
    model.b.weight[:, 3] = 0
    x = torch.randn(5, 4)
    before = model(x)
    assert set(clear(model, (x,), every(model), biases(model))) == {"a.weight", "a.bias"}
    torch.testing.assert_close(model(x), before)
    assert model.a.weight.any(1).tolist() == [True, True, True, False, True, True]


# --- other kinds of models ---


class Block(nn.Module):
    """A residual block with in-place operators, as is common."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 3)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.first(x))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.last(F.relu_(out).mean((2, 3)))


class Functional(nn.Module):
    """Tensors without modules."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "v": (9, 6),
            "b": (9,),
            "w": (8, 9),
            "c": (8,),
            "u": (3, 8),
            "bias": (3,),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        x = F.linear(x, self.v, self.b)
        F.relu_(x)
        x = F.linear(x, self.w, self.c)
        x[:, :4].clamp_(min=0)
        return F.linear(x, self.u, self.bias)


class Attention(nn.Module):
    """A transformer block with attention as several operators or as one."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.head, self.fused = nn.Linear(8, 3), fused

    def forward(self, tokens):
        x = self.embed(tokens)  # [B, T, I]
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            shut = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
            y = torch.softmax((q @ k.mT / 2).masked_fill(shut, -torch.inf), -1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x)


class Answers(Residual):
    """Several output tensors; a unit is read if any of them depends on it."""

    def forward(self, x):
        x = F.relu(self.a(x))
        return {
            "scores": self.c(x[:, :4].tanh() @ x.new_ones(4, 8)),
            "more": (self.b(x).sum(1), None, x[:, 7:]),
        }


OTHERS = {
    "in place": (Block, (5, 2, 6, 6)), "functional": (Functional, (5, 6)),
    "attention": (lambda: Attention(False), (5, 7)), "fused": (lambda: Attention(True), (5, 7)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (4, 5, 8)),
    "answers": (Answers, (5, 6)),
}  # fmt: skip


@pytest.mark.sampled("name")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_kinds_of_models_compute_the_same(name, seed):
    make, shape = OTHERS[name]
    model, g = sparse(make(), seed).double(), torch.Generator().manual_seed(seed)
    x = (
        torch.randint(9, shape, generator=g)
        if name in ("attention", "fused")
        else torch.randn(shape, generator=g)
    )
    x = x.double() if x.is_floating_point() else x
    before = tree_leaves(model(x.clone()))
    changed = clear(model, (x.clone(),), every(model), biases(model))
    assert changed, "no unit is dead with this seed, so the test shows nothing"
    for other in (x, x.roll(1, -1)):
        again = sparse(make(), seed).double()
        for out, was in zip(
            tree_leaves(model(other.clone())), tree_leaves(again(other.clone())), strict=True
        ):
            if was is not None:
                torch.testing.assert_close(out, was, rtol=1e-9, atol=1e-9)
    assert len(before) == len(tree_leaves(model(x.clone())))
    assert not clear(model, (x.clone(),), every(model), biases(model))


@torch.no_grad()
def test_dead_hidden_units_of_a_transformer_are_found():
    """No layer reads unit 3, and unit 5 is constant: compared with a calculation by hand."""
    model = Attention(True).eval()
    model.down.weight[:, 3] = 0
    model.up.weight[5] = 0
    bias, column, c = model.down.bias.clone(), model.down.weight[:, 5].clone(), F.gelu(model.up.bias[5])
    changed = clear(model, (torch.randint(9, (3, 5)),), every(model), biases(model))
    assert set(changed) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert [i for i in range(16) if not model.up.weight[i].any()] == [3, 5]
    assert not model.up.bias[[3, 5]].any()
    torch.testing.assert_close(model.down.bias, bias + column * c)


@torch.no_grad()
def test_all_output_tensors_count():
    model = Answers().eval()
    clear(model, (torch.randn(5, 6),), every(model), biases(model))
    assert model.a.weight.any(1).all()  # b reads all of them
    model.b.weight[:, 4:] = 0
    clear(model, (torch.randn(5, 6),), every(model), biases(model))
    assert model.a.weight.any(1).tolist() == [True] * 4 + [False] * 3 + [True]


def chosen(self, x):
    return self.c(torch.where(x[:, :1] > 0, self.a(x), self.b(x)))


def shut(self, x):
    return self.c(self.a(x) + self.b(x).masked_fill_(x.sum(1, keepdim=True) > 0, 0))


def picked(self, x):
    y = torch.stack([self.a(x), self.b(x)], 1)
    return self.c(y.gather(1, (x[:, :1, None] < 0).long().expand(-1, 1, 4))[:, 0])


def refilled(self, x):
    factor = torch.zeros(4, 4)
    turned = factor.t()
    factor.copy_(F.relu(-x[:4]))
    return self.c(self.a(x) @ turned + self.b(x))


@pytest.mark.parametrize("forward", [chosen, shut, picked, refilled])
@torch.no_grad()
def test_units_that_only_other_inputs_read_stay(forward):
    model = net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)).eval()
    assert not clear(model, (torch.rand(5, 4) + 0.1,), every(model), biases(model))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        y = self.a(x)
        self.seen.add_(y.sum(0))
        return self.b(y) + self.seen.sum()


def test_a_model_that_writes_to_its_own_buffers_is_refused():
    model = Counting().eval()
    with pytest.raises(RefusedError, match="its forward writes to seen"):
        clear(model, (torch.randn(3, 4),), every(model), biases(model))
    assert not model.seen.any()


def test_a_view_that_real_strides_do_not_allow_becomes_a_reshape(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 traced attention with strides that its kernels do not produce; here a reshape does it."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(15, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 3, 4]
            return self.last(self.first(x).relu().mT.reshape(-1, 15))

    def with_views(*given: object) -> graph.Graph:
        found = graph.traced(*given)
        for node in found.nodes:
            if node.target is torch.ops.aten.reshape.default:
                node.target, seen[node.name] = torch.ops.aten.view.default, True
        found.program.graph_module.recompile()
        return found

    seen: dict[str, bool] = {}
    monkeypatch.setattr(nan_propagation, "traced", with_views)
    model, x = Turned().eval(), torch.randn(6, 3, 4)
    with torch.no_grad():
        model.first.weight[2], model.first.bias[2] = 0, 1.5  # a constant unit
        before = model(x)
        assert clear(model, (x,), every(model), biases(model))
        assert seen
        torch.testing.assert_close(model(x), before)
    assert not model.last.weight.reshape(2, 5, 3)[:, 2].any()
