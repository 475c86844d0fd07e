"""Stock: replacements compute the same as the layer, and their sites are those of replaced_sites."""

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stock_cases import State
from torch import Tensor, nn
from torch.func import functional_call

from tersor.encode import coded
from tersor.errors import RefusedError, SettingError, SiteError, TersorError
from tersor.forms import Affine, Dense, Form, LowRank, Masked
from tersor.model.attention import Attention
from tersor.model.changed_copy import changed_structure
from tersor.model.changes import Replace, Set
from tersor.model.product import TRANSPOSED, factors
from tersor.model.replaced_sites import site_changes
from tersor.model.sites import sites_of
from tersor.model.stock import STOCK


def double(layer: nn.Module) -> nn.Sequential:
    """The layer in a model, in float64, so that only rounding may differ."""
    return nn.Sequential(layer).double().eval()


def low_rank(shape: tuple[int, ...], ranks: tuple[int, ...], how: str = "right") -> LowRank:
    """A product of factors, nested to the left, to the right, or in two pairs."""
    sizes = [(shape[0], ranks[0]), *zip(ranks, ranks[1:], strict=False), (ranks[-1], *shape[1:])]
    parts: list[Form] = [Dense(torch.randn(size, dtype=torch.float64)) for size in sizes]
    if how == "pairs" and len(parts) == 4:
        return LowRank(LowRank(parts[0], parts[1]), LowRank(parts[2], parts[3]))
    while len(parts) > 1:
        parts = [LowRank(*parts[:2]), *parts[2:]] if how == "left" else [*parts[:-2], LowRank(*parts[-2:])]
    whole = parts[0]
    return whole if isinstance(whole, LowRank) else LowRank(whole, whole)


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def sound(state: State) -> nn.Module:
    """The model of a state. Checks its sites, and that it can be copied, pickled and loaded."""
    twin = state.model()
    sites, _, aliases = sites_of(twin)
    assert sites == {
        name: dataclasses.replace(site, shape=state.forms[name].shape, origin="")
        for name, site in state.sites.items()
    }
    assert aliases == state.aliases
    again = state.model()
    again.load_state_dict(twin.state_dict())
    for other in (again, copy.deepcopy(twin), pickled(twin)):
        assert repr(other) == repr(twin)
        for name, value in other.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name])
    return twin


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def alive(model: nn.Module, x: Tensor) -> Tensor:
    """A model's output. Checks functional_call, export, and gradients for all parameters."""
    out = model(x)
    close(functional_call(model, model.state_dict(), (x,)), out)
    close(torch.export.export(model, (x,)).module()(x), out)
    model.zero_grad()
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return out.detach()


# --- product ---

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "linear, bare": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (2, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=2), (2, 3, 9, 9)),
    "conv2d, bare": (lambda: nn.Conv2d(3, 5, 1, bias=False), (2, 3, 4, 4)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "conv2d, same": (lambda: nn.Conv2d(3, 5, 4, padding="same", padding_mode="replicate"), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 2), (2, 3, 3, 3, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(5, 4, 3, stride=2), (2, 5, 4)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(5, 4, 3, stride=2, padding=1, output_padding=1, dilation=2),
        (2, 5, 4, 4),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(5, 4, 2, bias=False), (2, 5, 2, 2, 2)),
    "embedding": (lambda: nn.Embedding(7, 6), (4,)),
    "embedding, padded": (lambda: nn.Embedding(7, 6, padding_idx=2), (4,)),
}


def example(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(model[0], nn.Embedding):
        return torch.randint(7, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.sampled("what")
@pytest.mark.parametrize("ranks", [(3,), (4, 2), (4, 3, 2)])
@pytest.mark.parametrize("what", LAYERS)
def test_a_product_of_layers_computes_the_same(what: str, ranks: tuple[int, ...]) -> None:
    layer, shape = LAYERS[what]
    model = double(layer())
    for how in ("left", "right", "pairs"):
        state = State(model).edit("0.weight", lambda w, how=how: low_rank(tuple(w.shape), ranks, how))  # type: ignore[misc]
        x, whole = example(model, shape), state.model()
        state.change(Replace("0", "product", {"layers": len(ranks) + 1}))
        twin = sound(state)
        assert [type(layer) for layer in twin[0]].count(type(model[0])) >= 1
        assert len(twin[0]) == len(ranks) + 1
        assert getattr(twin[0][0], "padding_idx", None) == getattr(model[0], "padding_idx", None)
        with torch.no_grad():
            close(twin(x), whole(x))
    close(alive(twin, x), whole(x))


def test_the_sites_of_a_product() -> None:
    state = State(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()))
    state.edit("0.weight", lambda w: low_rank(tuple(w.shape), (4, 2), "left"))
    state.change(Replace("0", "product", {"layers": 3}))
    assert {name: (site.shape, site.origin, site.layer) for name, site in state.sites.items()} == {
        "0.0.weight": ((2, 3, 3, 3), "0.weight right", "0.0"),
        "0.1.weight": ((4, 2, 1, 1), "0.weight left.right", "0.1"),
        "0.2.weight": ((5, 4, 1, 1), "0.weight left.left", "0.2"),
        "0.2.bias": ((5,), "0.bias", "0.2"),
    }
    first, *others = state.model()[0]
    assert (first.kernel_size, first.padding, first.in_channels, first.out_channels) == ((3, 3), (1, 1), 3, 2)
    assert [(one.in_channels, one.out_channels, one.kernel_size) for one in others] == [
        (2, 4, (1, 1)), (4, 5, (1, 1)),
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["linear", "conv2d", "transposed2d", "embedding"])
def test_the_factors_keep_their_forms(what: str) -> None:
    """The new layers have the forms of the factors: quantized, masked, coded."""

    def factor(w: Tensor, axis: int) -> Form:
        codes = torch.randint(-9, 9, w.shape).to(torch.int8)
        rows = w.shape[axis]
        keep = torch.rand(w.shape) < 0.7
        return Masked(Dense(keep), Affine(coded(codes, keep), Dense(torch.rand(rows, 1) + 0.1), axis=axis))

    model = double(LAYERS[what][0]())
    state = State(model)

    def stored(w: Tensor) -> LowRank:
        return LowRank(factor(torch.empty(w.shape[0], 2), 0), factor(torch.empty(2, *w.shape[1:]), 1))

    state.edit("0.weight", stored)
    before, whole = state.forms["0.weight"], state.model()
    state.change(Replace("0", "product", {"layers": 2}))
    for form in (state.forms["0.0.weight"], state.forms["0.1.weight"]):
        assert isinstance(form, Masked)
        assert isinstance(form.body, Affine)
    sizes = sum(stored_numbers(form) for _, form in factors(before))
    assert sum(stored_numbers(state.forms[f"0.{k}.weight"]) for k in range(2)) == sizes
    x = example(model, LAYERS[what][1])
    with torch.no_grad():
        assert torch.allclose(sound(state)(x), whole(x), rtol=1e-4, atol=1e-4)


def stored_numbers(form: Form) -> int:
    """The count of stored numbers."""
    return sum(math.prod(node.shape) for _, node in form.walk() if node.name == "affine")


def test_a_product_can_be_cut_and_replaced_again() -> None:
    """Later changes use the names of the new layers; ranks and outputs can be cut like channels."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).double()
    state = (
        State(model)
        .cut("0.weight", 0, 0, 1, 2, 4)
        .cut("0.bias", 0, 0, 1, 2, 4)
        .cut("1.weight", 1, 0, 1, 2, 4)
    )
    state.edit("0.weight", lambda w: low_rank(tuple(w.shape), (3,)))
    state.change(Replace("0", "product", {"layers": 2}))
    state.cut("0.0.weight", 0, 0, 2).cut("0.1.weight", 1, 0, 2)
    state.cut("0.1.weight", 0, 1, 2).cut("0.1.bias", 0, 1, 2).cut("1.weight", 1, 1, 2)
    state.change(Replace("0.0", "bias"))
    state.edit("0.0.weight", lambda w: low_rank(tuple(w.shape), (1,)))
    state.change(Replace("0.0", "product", {"layers": 2}))
    twin = sound(state)
    first, last = twin[0]
    assert [(one.in_features, one.out_features) for one in first] == [(6, 1), (1, 2)]
    assert (last.in_features, last.out_features, twin[1].in_features) == (2, 2, 2)
    x = torch.randn(3, 6, dtype=torch.float64)
    forms = {name: form.decode() for name, form in state.forms.items()}
    inner = x @ (forms["0.0.1.weight"] @ forms["0.0.0.weight"]).T
    close(twin[0](x), inner @ forms["0.1.weight"].T + forms["0.1.bias"])
    assert state.sites["0.0.1.bias"].origin == "0.0.bias"
    assert (forms["0.0.1.bias"] == 0).all()


def test_no_random_numbers_are_used() -> None:
    state = State(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Embedding(4, 3)))
    state.edit("0.weight", lambda w: low_rank(tuple(w.shape), (2,)))
    state.edit("1.weight", lambda w: low_rank(tuple(w.shape), (2,)))
    before = torch.random.get_rng_state()
    state.change(Replace("0", "product", {"layers": 2}), Replace("1", "product", {"layers": 2}))
    state.model()
    assert torch.equal(torch.random.get_rng_state(), before)


# --- tucker, cp, spatial ---

CONVOLUTIONS = ("conv1d", "conv2d", "conv2d, circular", "conv2d, same", "conv3d")


def inner_product(shape: tuple[int, ...], how: str) -> LowRank:
    """A product of rank 4 whose right factor has rank 2 in its inputs, or slices of rank 1."""
    o, i, *kernel = shape
    kinds = {"tucker": "rs...,si->ri...", "cp": "r...,ri->ri..."}
    core = torch.randn(4, *([2] if how == "tucker" else []), *kernel, dtype=torch.float64)
    inputs = torch.randn(2 if how == "tucker" else 4, i, dtype=torch.float64)
    right = torch.einsum(kinds[how], core, inputs)
    return LowRank(Dense(torch.randn(o, 4, dtype=torch.float64)), Dense(right))


@pytest.mark.parametrize("how", ["tucker", "cp", "spatial"])
@pytest.mark.parametrize("what", CONVOLUTIONS)
def test_factors_of_a_convolution_compute_the_same(what: str, how: str) -> None:
    layer, shape = LAYERS[what]
    model = double(layer())
    if how == "spatial" and "2d" not in what:
        with pytest.raises(RefusedError, match="has no spatial factors; convolutions in two dimensions have"):
            State(model).change(Replace("0", how, {"rank": 2}))
        return
    state, rank = State(model), {"tucker": 2, "cp": 4, "spatial": 3}[how]
    if how == "spatial":
        o, i, h, w = model[0].weight.shape
        state.edit("0.weight", lambda _: Dense(torch.einsum(
            "orw,rih->oihw", torch.randn(o, rank, w).double(), torch.randn(rank, i, h).double()
        )))  # fmt: skip
    else:
        state.edit("0.weight", lambda w: inner_product(tuple(w.shape), how))
    x, whole = example(model, shape), state.model()
    state.change(Replace("0", how, {"rank": rank}))
    twin = sound(state)
    assert len(twin[0]) == (2 if how == "spatial" else 3)
    assert (
        sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in model.parameters()) or "1d" in what
    )
    with torch.no_grad():
        close(twin(x), whole(x))
    close(alive(twin, x), whole(x))


# --- bias, identity, untie ---


@pytest.mark.parametrize("what", ["linear, bare", "conv2d, bare", "transposed3d"])
def test_a_bias_of_zeros(what: str) -> None:
    layer, shape = LAYERS[what]
    model = double(layer())
    state = State(model).change(Replace("0", "bias"))
    assert (state.sites["0.bias"].origin, state.sites["0.bias"].dtype) == ("0.bias zeros", "float64")
    assert state.forms["0.bias"].decode().dtype is torch.float64
    twin, x = sound(state), example(model, shape)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        assert model[0].bias is None
    close(alive(twin, x), model(x))
    assert type(twin[0]) is type(model[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_the_size_of_a_transposed_bias(groups: int) -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False))
    state = State(model).cut("0.weight", 1, 0, 2).change(Replace("0", "bias"))
    assert state.forms["0.bias"].shape == (2 * groups,)
    assert sound(state)(torch.randn(1, 4, 5)).shape == (1, 2 * groups, 7)


def test_identity() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 2))
    state = State(model).change(Replace("1", "identity"))
    assert set(state.forms) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(sound(state)(x), model[2](model[0](x)))


class Tied(nn.Module):
    """An embedding tied to the head's weight, and a layer with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.again, self.block = self.head, nn.ModuleDict({"head": self.head})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["head"](self.embed(x)) + self.again(self.embed(x))


def test_untied() -> None:
    model = Tied()
    state = State(model)
    assert state.aliases == dict.fromkeys(
        ("head.weight", "again.weight", "block.head.weight"), "embed.weight"
    )
    state.change(Replace("again", "untie", {"tensor": "weight"}))
    assert state.aliases == dict.fromkeys(("again.weight", "block.head.weight"), "head.weight")
    site = state.sites["head.weight"]
    assert (site.kind, site.layer, site.origin, site.shape) == (
        "linear",
        "head",
        "embed.weight untied",
        (7, 4),
    )
    twin, x = sound(state), torch.tensor([1, 2, 5])
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    state.edit("embed.weight", lambda w: Dense(w * 2))
    twin = sound(state)
    assert twin.head is twin.again is twin.block["head"]
    assert twin.head.weight is not twin.embed.weight
    with torch.no_grad():
        assert torch.equal(twin(x), model(x) * 2)
    state.edit("head.weight", lambda w: low_rank(tuple(w.shape), (2,)))
    state.change(Replace("again", "product", {"layers": 2}))
    assert "block.head.1.weight" in state.aliases
    twin = sound(state)
    assert twin.head is twin.again
    assert twin(x).shape == (3, 7)


def test_untied_and_then_cut() -> None:
    """The embedding can be cut without its head, and replaced by an identity."""
    state = State(Tied()).change(Replace("head", "untie", {"tensor": "weight"}))
    state.cut("embed.weight", 1, 0, 2).cut("head.weight", 1, 1, 2)
    twin = sound(state)
    assert torch.equal(twin.embed.weight, state.given.embed.weight[:, [0, 2]])
    assert torch.equal(twin.head.weight, state.given.embed.weight[:, [1, 2]])
    assert (twin.embed.embedding_dim, twin.head.in_features) == (2, 2)
    state.change(Replace("embed", "identity"))
    assert set(sound(state).state_dict()) == {"head.weight", "again.weight", "block.head.weight"}


def test_cut_and_then_untied() -> None:
    """A site untied from a cut one has the cut shape, which differs from that of the given model."""
    state = State(Tied()).cut("embed.weight", 1, 0, 2).change(Replace("head", "untie", {"tensor": "weight"}))
    assert state.sites["head.weight"].shape == (7, 2)
    state.change(Replace("embed", "identity"))
    assert torch.equal(sound(state).head.weight, state.given.embed.weight[:, [0, 2]])


def test_set_integers_are_forgotten_with_a_replaced_module() -> None:
    """An integer that was set holds for that module, not for its replacement."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.MultiheadAttention(8, 4))
    state = State(model).change(Set("0.0", "in_features", 3), Replace("0", "identity"))
    state.change(Set("1", "num_heads", 4), Replace("1", "attention"))
    twin = sound(heads_left(state, "1", 2))
    assert isinstance(twin[0], nn.Identity)
    assert (twin[1].num_heads, twin[1].head_dim) == (1, 2)


def test_buffers_are_untied() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.arange(3.0))
    model.register_buffer("b", model.a)
    state = State(model).change(Replace("", "untie", {"tensor": "b"}))
    state.edit("b", lambda w: Dense(w + 1))
    twin = sound(state)
    assert torch.equal(twin.b, twin.a + 1)


def test_the_model_itself_is_replaced() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    state = State(model).edit("weight", lambda w: low_rank(tuple(w.shape), (2,)))
    whole = state.model()
    state.change(Replace("", "bias"), Replace("", "product", {"layers": 2}))
    assert set(state.sites) == {"0.weight", "1.weight", "1.bias"}
    close(sound(state)(x), whole(x))


# --- attention ---


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True, **options)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


def heads_left(state: State, layer: str, *heads: int, width: int = 2, stream: int = 8) -> State:
    """Cut all heads except these."""
    rows = [head * width + unit for head in heads for unit in range(width)]
    three = [k * stream + row for k in range(3) for row in rows]
    for name, axis, kept in (
        ("in_proj_weight", 0, three), ("in_proj_bias", 0, three), ("out_proj.weight", 1, rows),
        ("bias_k", 2, rows), ("bias_v", 2, rows),
    ):  # fmt: skip
        if f"{layer}.{name}" in state.forms:
            state.cut(f"{layer}.{name}", axis, *kept)
    return state


def masked_heads(model: Any, layer: str, *heads: int, width: int = 2) -> nn.Module:
    """The model with the outputs of the other heads set to zero."""
    model = copy.deepcopy(model)
    gone = [head * width + unit for head in range(4) if head not in heads for unit in range(width)]
    with torch.no_grad():
        model.get_submodule(layer).out_proj.weight[:, gone] = 0
    return model


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str
)
def test_attention_without_some_heads(options: dict[str, Any]) -> None:
    model = Block(**options).double().eval()
    state = State(model).change(Replace("attention", "attention"))
    assert state.sites == sites_of(model)[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    close(sound(state)(x), model(x))
    heads_left(state, "attention", 0, 3).change(Set("attention", "num_heads", 2))
    twin = sound(state)
    assert isinstance(twin.attention, Attention)
    one = twin.attention
    assert (one.num_heads, one.head_dim, one.embed_dim) == (2, 2, 8)
    assert (one.out_proj.in_features, one.out_proj.out_features) == (4, 8)
    close(alive(twin, x), masked_heads(model, "attention", 0, 3)(x))


def test_the_number_of_heads_follows_from_shapes_if_not_set() -> None:
    state = State(Block()).change(Replace("attention", "attention"))
    assert sound(heads_left(state, "attention", 1)).attention.num_heads == 1


def test_the_number_of_heads_follows_from_shapes_after_a_replacement() -> None:
    """The number was set on the replaced layer."""
    now = Replace("attention", "attention", {"num_heads": 2, "head_dim": 4})
    state = State(Block()).change(Set("attention", "num_heads", 2)).change(now)
    rows = [k * 8 + row for k in range(3) for row in range(4)]
    state.cut("attention.in_proj_weight", 0, *rows).cut("attention.in_proj_bias", 0, *rows)
    twin = sound(state.cut("attention.out_proj.weight", 1, 0, 1, 2, 3))
    assert (twin.attention.num_heads, twin.attention.head_dim) == (1, 4)


def test_attention_of_narrower_heads() -> None:
    """One channel of each head is cut from queries, keys and values; the scale does not change."""
    model = Block().double().eval()
    state = State(model).change(Replace("attention", "attention"))
    rows = [0, 2, 4, 6]
    three = [k * 8 + row for k in range(3) for row in rows]
    state.cut("attention.in_proj_weight", 0, *three).cut("attention.in_proj_bias", 0, *three)
    state.cut("attention.out_proj.weight", 1, *rows).change(Set("attention", "num_heads", 4))
    twin = sound(state)
    assert (twin.attention.num_heads, twin.attention.head_dim) == (4, 1)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for k in range(24):
            if k not in three:
                masked.attention.in_proj_weight[k] = 0
                masked.attention.in_proj_bias[k] = 0
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    close(twin(x), masked(x))


def test_attention_replaced_after_a_cut() -> None:
    """The change has the number and the width of the heads, which no longer follow from shapes."""
    model = nn.MultiheadAttention(8, 4)
    stay, state = [0, 2, 4, 6], State(model)
    three = [k * 8 + row for k in range(3) for row in stay]
    state.cut("in_proj_weight", 0, *three).cut("in_proj_weight", 1, *stay).cut("in_proj_bias", 0, *three)
    state.cut("out_proj.weight", 0, *stay).cut("out_proj.weight", 1, *stay).cut("out_proj.bias", 0, *stay)
    before = state.model()
    assert (before.num_heads, before.head_dim) == (4, 1)
    state.change(Replace("", "attention", {"head_dim": 1}))
    after, x = sound(state), torch.randn(3, 2, 4)
    assert (after.num_heads, after.head_dim, after.embed_dim) == (4, 1, 4)
    assert torch.allclose(after(x, x, x)[0], before(x, x, x)[0], atol=1e-6)


def test_the_output_of_attention_as_a_product() -> None:
    model = Block().double().eval()
    state = State(model).change(Replace("attention", "attention"))
    state.edit("attention.out_proj.weight", lambda w: low_rank(tuple(w.shape), (3,)))
    whole, x = state.model(), torch.randn(2, 5, 8, dtype=torch.float64)
    state.change(Replace("attention.out_proj", "product", {"layers": 2}))
    close(sound(state)(x), whole(x))
    heads_left(state, "attention", 0, 3).cut("attention.out_proj.0.weight", 1, 0, 1, 6, 7)
    with torch.no_grad():
        whole.attention.out_proj.weight[:, 2:6] = 0
    twin = sound(state.change(Set("attention", "num_heads", 2)))
    assert twin.attention.out_proj[0].in_features == 4
    close(twin(x), whole(x))


def encoder(layers: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, dropout=0.0, **options).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0.0, 0.5)
        if not layers:
            return nn.ModuleDict({"0": layer}).eval()["0"]
        return nn.TransformerEncoder(layer, layers).eval()


CALLS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "mask": {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "padding": {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_transformers_of_torch(call: str, grad: bool) -> None:
    """In eval mode without gradients they pass weights to a fused kernel, but not after a replacement."""
    model = encoder(2)
    state = State(model)
    for k in range(2):
        state.change(Replace(f"layers.{k}.self_attn", "attention"))
    x, seen = torch.randn(2, 5, 8, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    if call == "padding":
        seen = ~CALLS[call]["src_key_padding_mask"]
    with torch.set_grad_enabled(grad):
        close(sound(state)(x, **CALLS[call])[seen], model(x, **CALLS[call])[seen])
        masked: Any = model
        for k in range(2):
            heads_left(state, f"layers.{k}.self_attn", 1, 2, 3).change(
                Set(f"layers.{k}.self_attn", "num_heads", 3)
            )
            masked = masked_heads(masked, f"layers.{k}.self_attn", 1, 2, 3)
        close(state.model()(x, **CALLS[call])[seen], masked(x, **CALLS[call])[seen])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("part", ["linear1", "linear2"])
def test_other_parts_of_transformers(part: str, call: str, grad: bool) -> None:
    model = encoder(2)
    state = State(model).edit(f"layers.0.{part}.weight", lambda w: low_rank(tuple(w.shape), (3,)))
    whole, x = state.model(), torch.randn(2, 5, 8, dtype=torch.float64)
    state.change(Replace(f"layers.0.{part}", "product", {"layers": 2}))
    seen = ~CALLS[call].get("src_key_padding_mask", torch.zeros(2, 5, dtype=torch.bool))
    with torch.set_grad_enabled(grad):
        close(state.model()(x, **CALLS[call])[seen], whole(x, **CALLS[call])[seen])


def test_fused_kernels_take_fewer_hidden_units() -> None:
    """Without a replacement the fused kernel is used, with the new weights."""
    model = encoder()
    state = State(model).cut("linear1.weight", 0, 0, 3, 5).cut("linear1.bias", 0, 0, 3, 5)
    state.cut("linear2.weight", 1, 0, 3, 5)
    twin, x = sound(state), torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        fast = twin(x)
    close(twin(x), fast)


# --- hooks, lists, refusals ---


def test_hooks_and_modes_are_kept() -> None:
    model, seen = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU()), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.eval()
    state = State(model).edit("0.weight", lambda w: low_rank(tuple(w.shape), (1,)))
    x, whole = torch.randn(2, 3), state.model()
    state.change(Replace("0", "product", {"layers": 2}))
    twin = state.model()
    assert not twin[0].training
    assert not twin[0][0].training
    seen.clear()
    assert torch.allclose(twin(x), whole(x), atol=1e-5)
    assert seen == ["Sequential", "Linear"]
    assert State(model).change(Replace("0", "bias")).model()[0]._forward_hooks


class Listed(nn.Module):
    """Layers that the model calls through a plain list, a dictionary and a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.order, self.named, self.call = [self.a], {"b": self.b}, self.c.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.named["b"](self.order[0](x)))


def test_layers_in_plain_lists() -> None:
    model = Listed().double()
    state = State(model)
    for name in "abc":
        state.edit(f"{name}.weight", lambda w: low_rank(tuple(w.shape), (2,)))
    x = torch.randn(2, 3, dtype=torch.float64)
    whole = state.model()
    want = whole.c(whole.b(whole.a(x)))
    close(whole(x), want)
    state.change(*(Replace(name, "product", {"layers": 2}) for name in "ab"))
    state.change(Replace("b", "identity"), Replace("a.0", "bias"))
    twin = sound(state)
    assert twin.order[0] is twin.a
    assert twin.named["b"] is twin.b
    assert twin.call.__self__ is twin.c
    close(twin(x), whole.c(whole.a(x)))


class Own(nn.Linear):
    pass


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_state_dict_post_hook(lambda *_: None)
    return model


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False)))


PRODUCT = {"layers": 2}
WRONG: dict[str, tuple[Callable[[], nn.Module], Replace, type[TersorError], str]] = {
    "no such stock": (
        lambda: nn.Linear(2, 2),
        Replace("", "prodct", {}),
        SettingError,
        "did you mean 'product'?",
    ),
    "no setting": (
        lambda: nn.Linear(2, 2),
        Replace("", "product"),
        SettingError,
        "needs the setting 'layers'",
    ),
    "another setting": (
        lambda: nn.Linear(2, 2),
        Replace("", "bias", {"rank": 1}),
        SettingError,
        "has no setting 'rank'",
    ),
    "a text": (
        lambda: nn.Linear(2, 2),
        Replace("", "product", {"layers": "2"}),
        SettingError,
        "takes no '2' for 'layers'",
    ),
    "no module": (Tied, Replace("haed", "identity"), SiteError, "no module 'haed'; did you mean 'head'?"),
    "a tied site": (
        Tied,
        Replace("embed", "identity"),
        RefusedError,
        "is tied to again.weight, which stays. Untie them first: Replace(module='again', stock='untie'",
    ),
    "a tied alias": (
        Tied,
        Replace("head", "identity"),
        RefusedError,
        "head.weight is tied to embed.weight, which stays. Untie them first: Replace(module='head'",
    ),
    "untie a site": (
        Tied,
        Replace("embed", "untie", {"tensor": "weight"}),
        RefusedError,
        "embed.weight is a site, not an alias: untie again.weight instead",
    ),
    "untie nothing": (
        lambda: nn.Linear(2, 2),
        Replace("", "untie", {"tensor": "weight"}),
        RefusedError,
        "it is tied to nothing",
    ),
    "untie no tensor": (
        Tied,
        Replace("head", "untie", {"tensor": "wieght"}),
        SiteError,
        "no tensor 'wieght'; did you mean 'weight'?",
    ),
    "product of no layer": (
        nn.Tanh,
        Replace("", "product", PRODUCT),
        RefusedError,
        "a Tanh cannot become a product of layers",
    ),
    "product of the user's layer": (
        lambda: Own(2, 2),
        Replace("", "product", PRODUCT),
        RefusedError,
        "a Own cannot become a product of layers",
    ),
    "product of no factors": (
        lambda: nn.Linear(2, 2),
        Replace("", "product", PRODUCT),
        RefusedError,
        "is stored as 1 factor, but 2 layers were requested",
    ),
    "product of one": (
        lambda: nn.Linear(2, 2),
        Replace("", "product", {"layers": 1}),
        RefusedError,
        "a product has 2 to 4 layers, not 1",
    ),
    "product of groups": (
        lambda: nn.Conv1d(4, 4, 3, groups=2),
        Replace("", "product", PRODUCT),
        RefusedError,
        "2 groups",
    ),
    "product of short rows": (
        lambda: nn.Embedding(4, 4, max_norm=1.0),
        Replace("", "product", PRODUCT),
        RefusedError,
        "max_norm rescales",
    ),
    "factors of a linear layer": (
        lambda: nn.Linear(2, 2),
        Replace("", "tucker", {"rank": 1}),
        RefusedError,
        "a Linear has no tucker factors; convolutions have",
    ),
    "factors of groups": (
        lambda: nn.Conv1d(4, 4, 3, groups=2),
        Replace("", "cp", {"rank": 1}),
        RefusedError,
        "2 groups; cp factors have one",
    ),
    "factors of no product": (
        lambda: nn.Conv2d(4, 4, 3),
        Replace("", "tucker", {"rank": 1}),
        RefusedError,
        "tucker factors start from a product",
    ),
    "factors of rank 0": (
        lambda: nn.Conv2d(4, 4, 3),
        Replace("", "spatial", {"rank": 0}),
        RefusedError,
        "is 1 or more, not 0",
    ),
    "product of a weight that is computed": (
        weight_normed,
        Replace("0", "product", PRODUCT),
        RefusedError,
        "a ParametrizedLinear cannot become a product",
    ),
    "a bias for a norm": (
        lambda: nn.LayerNorm(2),
        Replace("", "bias"),
        RefusedError,
        "a LayerNorm takes no bias",
    ),
    "a second bias": (lambda: nn.Linear(2, 2), Replace("", "bias"), RefusedError, "has a bias already"),
    "a bias for a weight that is computed": (
        weight_normed,
        Replace("0", "bias"),
        RefusedError,
        "computes its weight: a bias cannot be added",
    ),
    "attention of another kind": (
        lambda: nn.Linear(2, 2),
        Replace("", "attention"),
        RefusedError,
        "a Linear cannot become a stock attention",
    ),
    "what attention of torch reads": (
        lambda: nn.MultiheadAttention(4, 2),
        Replace("out_proj", "identity"),
        RefusedError,
        "nn.MultiheadAttention reads its weight and does not call it. Replace the attention first",
    ),
    "a hook on the state dict": (
        hooked,
        Replace("0", "identity"),
        RefusedError,
        "0 has a hook on its state dict",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_replacements_are_refused(what: str) -> None:
    model, change, error, says = WRONG[what]
    state = State(model())
    with pytest.raises(error) as caught:
        state.change(change).model()
    assert says in str(caught.value)


def test_born_changes_none_of_its_arguments() -> None:
    model = Tied()
    state = State(model)
    before = dict(state.sites), dict(state.forms), dict(state.aliases), copy.deepcopy(model.state_dict())
    site_changes(
        Replace("head", "untie", {"tensor": "weight"}), state.sites, state.forms, state.aliases, model
    )
    assert (state.sites, state.forms, state.aliases) == before[:3]
    assert model.head.weight is model.embed.weight


def test_a_changed_model_takes_no_memory() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    twin = changed_structure(model, [Replace("0", "identity")])
    assert {value.device.type for value in twin.state_dict().values()} == {"meta"}
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}


def test_every_stock_is_tested_on_a_fresh_model_and_a_files_forms() -> None:
    """The same changes to a fresh model, with the forms of a file, give the same module."""
    changes = {
        "identity": Replace("norm", "identity"), "attention": Replace("attention", "attention"),
        "product": Replace("wide", "product", {"layers": 2}), "bias": Replace("wide", "bias"),
        "untie": Replace("tied", "untie", {"tensor": "weight"}), "scaled": Replace("plain", "scaled"),
        **{how: Replace(how, how, {"rank": 2}) for how in ("tucker", "cp", "spatial")},
        "zeros": Replace("silent", "zeros", {"axis": -1, "size": 5}),
    }  # fmt: skip
    assert changes.keys() == STOCK.keys()

    def factory() -> nn.ModuleDict:
        parts: Any = nn.ModuleDict(
            {
                "attention": nn.MultiheadAttention(4, 2), "norm": nn.LayerNorm(4),
                "wide": nn.Linear(4, 6, bias=False), "embed": nn.Embedding(6, 4),
                "tied": nn.Linear(4, 6, bias=False), "plain": nn.Linear(4, 6), "silent": nn.Linear(4, 5),
                **{how: nn.Conv2d(3, 4, 3) for how in ("tucker", "cp", "spatial")},
            }
        )  # fmt: skip
        parts["tied"].weight = parts["embed"].weight
        return parts

    state = State(factory())
    state.edit("wide.weight", lambda w: low_rank(tuple(w.shape), (2,)))
    for how in ("tucker", "cp"):
        state.edit(
            f"{how}.weight", lambda w: LowRank(Dense(torch.randn(4, 2)), Dense(torch.randn(2, 3, 3, 3)))
        )
    order = ("attention", "bias", "product", "untie", "identity", "scaled", "zeros")
    state.change(*(changes[name] for name in (*order, "tucker", "cp", "spatial")))
    first, second = sound(state), state.model(factory())
    assert repr(first) == repr(second)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_the_axis_that_a_transposed_product_is_split_along() -> None:
    """Axis 0 of its weight is the inputs, so they are on the left factor of a LowRank form."""
    assert all(kind(2, 3, 1).weight.shape[:2] == (2, 3) for kind in TRANSPOSED)


def zeros(layer: nn.Module, **settings: int) -> nn.Module:
    """A network of this layer and one more, after the change, from a state that lost the layer's sites."""
    state = State(nn.ModuleDict({"f": layer, "rest": nn.Linear(2, 2)}))
    state.change(Replace("f", "zeros", settings))
    assert set(state.sites) == {"rest.weight", "rest.bias"}
    return state.model().get_submodule("f")


@pytest.mark.parametrize(
    ("layer", "shape", "settings"),
    [
        (nn.LayerNorm(4), (2, 3, 4), {}), (nn.Linear(4, 5), (2, 3, 4), {"axis": -1, "size": 5}),
        (nn.Linear(4, 5), (7, 4), {"axis": -1, "size": 5}),
        (nn.Conv2d(3, 6, 3, padding=1), (1, 3, 4, 5), {"axis": 1, "size": 6}),
        (nn.Conv2d(3, 3, 1), (0, 3, 4, 5), {}),
    ],
)  # fmt: skip
def test_zeros_have_the_shape_of_the_layers_output(
    layer: nn.Module, shape: tuple[int, ...], settings: dict[str, int]
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    wanted = copy.deepcopy(layer).double()(x)
    got = zeros(layer, **settings)(x)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    assert not got.any()


def test_zeros_stand_for_layers_that_return_tuples_and_take_anything() -> None:
    stub = zeros(nn.MultiheadAttention(4, 2), outputs=2)
    x = torch.randn(3, 2, 4)
    out, none = stub(torch.tensor([1, 2]), query=x, key=x, mask=None)
    assert none is None
    assert torch.equal(out, torch.zeros_like(x))
    assert not torch.isnan(zeros(nn.Linear(4, 4))(torch.full((2, 4), torch.nan))).any()


@pytest.mark.parametrize(
    "settings", [{"size": -1}, {"size": 1 << 30}, {"size": 3, "axis": 9}, {"outputs": 99}, {"outputs": -1}]
)
def test_zeros_of_impossible_shapes_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(RefusedError, match=r"f: no zeros have axis"):
        zeros(nn.Linear(4, 4), **settings)
    with pytest.raises(RefusedError, match="no floating tensor"):
        zeros(nn.Linear(4, 4))(torch.tensor([1]))
