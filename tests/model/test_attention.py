"""Attention: equal to nn.MultiheadAttention for all options, and heads can be cut."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersor.errors import RefusedError
from tersor.model.attention import Attention

B, T, S, E, H = 3, 4, 5, 8, 4


def pair(seed: int = 0, **options: Any) -> tuple[nn.MultiheadAttention, Attention]:
    """A PyTorch layer with nonzero biases, and an Attention with its parameters, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.MultiheadAttention(E, H, dtype=torch.float64, **options).eval()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
    return layer, Attention(layer)


def inputs(layer: nn.MultiheadAttention, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value: "self", "cross" (key is value) or "three"."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int, width: int) -> Tensor:
        shape = (B, length, width) if layer.batch_first else (length, B, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = draw(T, E)
    if how == "self":
        return query, query, query
    key = draw(S, layer.kdim)
    return query, key, key if how == "cross" else draw(S, layer.vdim)


def compare(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 6, "vdim": 7},
    "widths, no bias": {"kdim": 6, "vdim": 7, "bias": False},
    "key width, bias kv": {"kdim": 6, "add_bias_kv": True},
}


def masks(length: int, keys: int) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    flat = torch.rand(length, keys, generator=generator) < 0.3
    flat[:, 0] = False
    deep = torch.rand(B * H, length, keys, generator=generator) < 0.3
    deep[:, :, 0] = False
    hidden = torch.zeros(B, keys, dtype=torch.bool)
    hidden[1, -2:] = True
    numbers = torch.randn(length, keys, generator=generator, dtype=torch.float64)
    return {
        "none": {},
        "bool": {"attn_mask": flat},
        "float": {"attn_mask": numbers},
        "a head": {"attn_mask": deep},
        "padding": {"key_padding_mask": hidden},
        "both": {"attn_mask": deep, "key_padding_mask": hidden},
        "float padding": {"key_padding_mask": torch.randn(B, keys, generator=generator, dtype=torch.float64)},
        "flat and padding": {"attn_mask": flat, "key_padding_mask": hidden},
    }


@pytest.mark.sampled
@pytest.mark.parametrize("how", ["self", "cross", "three"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("what", OPTIONS)
def test_outputs_equal_those_of_pytorch(what: str, batch_first: bool, how: str) -> None:
    theirs, ours = pair(batch_first=batch_first, **OPTIONS[what])
    if "width" in what:
        how = "three"
    x = inputs(theirs, how)
    keys = x[1].shape[1 if batch_first else 0]
    for mask, (need, mean) in itertools.product(masks(T, keys).values(), [(0, 1), (1, 1), (1, 0)]):
        call = {**mask, "need_weights": bool(need), "average_attn_weights": bool(mean)}
        with torch.no_grad():  # PyTorch may use its fused kernel here
            compare(ours(*x, **call), theirs(*x, **call))
        compare(ours(*x, **call), theirs(*x, **call))


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal_hint(what: str, need: bool, padded: bool) -> None:
    theirs, ours = pair(**OPTIONS[what])
    x = inputs(theirs, "three")
    x = (x[0], x[1][:T], x[2][:T])
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    call: dict[str, Any] = {"attn_mask": mask, "is_causal": True, "need_weights": need}
    if padded:
        call |= masks(T, T)["padding"]
    compare(ours(*x, **call), theirs(*x, **call))


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("need", [True, False])
def test_inputs_without_a_batch(what: str, need: bool) -> None:
    theirs, ours = pair(**OPTIONS[what])
    x = tuple(each[:, 0] for each in inputs(theirs, "three"))
    hidden = torch.tensor([False, False, True, False, True])
    mask = masks(T, S)["bool"]["attn_mask"]
    assert mask.any()
    for call in ({}, {"key_padding_mask": hidden}, {"attn_mask": mask}):
        compare(ours(*x, **call, need_weights=need), theirs(*x, **call, need_weights=need))


@pytest.mark.parametrize("need", [True, False])
def test_dropout_draws_the_same_numbers(need: bool) -> None:
    theirs, ours = pair(dropout=0.5)
    x = inputs(theirs, "self")
    found = []
    for layer in (theirs.train(), ours.train()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            found.append(layer(*x, need_weights=need))
    compare(found[1], found[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        assert not torch.allclose(ours(*x, need_weights=need)[0], found[1][0])


@pytest.mark.parametrize("need", [True, False])
def test_nothing_is_dropped_in_evaluation(need: bool) -> None:
    theirs, ours = pair(dropout=0.5)
    x = inputs(theirs, "self")
    compare(ours(*x, need_weights=need), theirs(*x, need_weights=need))


def test_transformer_layers_of_pytorch_call_it() -> None:
    """In eval mode without gradients they would use their fused kernel instead."""
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(B, T, E, dtype=torch.float64)
    want = layer(x)
    layer.self_attn = Attention(layer.self_attn)
    with torch.no_grad():
        assert torch.allclose(layer(x), want, rtol=1e-12)


def test_gradients_equal_those_of_pytorch() -> None:
    theirs, _ = pair()
    ours = Attention(copy.deepcopy(theirs))
    x = inputs(theirs, "cross")
    for layer in (theirs, ours):
        layer(*x)[0].square().sum().backward()
    for (name, a), (same, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == same
        assert torch.allclose(a.grad, b.grad, rtol=1e-10)


@pytest.mark.parametrize("what", OPTIONS)
def test_the_state_dict_equals_that_of_pytorch(what: str) -> None:
    theirs, ours = pair(**OPTIONS[what])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    other = Attention(pair(seed=9, **OPTIONS[what])[0])
    other.load_state_dict(theirs.state_dict())
    x = inputs(theirs, "three")
    compare(other(*x), ours(*x))


def test_fewer_heads_of_the_same_width() -> None:
    """Keeping two of four heads equals setting the outputs of the others to zero."""
    whole, ours = pair()
    x, width, heads = inputs(whole, "self"), E // H, torch.tensor([0, 2])
    rows = (heads[:, None] * width + torch.arange(width)).flatten()
    with torch.no_grad():
        gone = torch.ones(E, dtype=torch.bool)
        gone[rows] = False
        whole.out_proj.weight[:, gone] = 0
        three = torch.cat([rows + k * E for k in range(3)])
        cut = Attention(whole)
        cut.in_proj_weight = nn.Parameter(whole.in_proj_weight[three])
        cut.in_proj_bias = nn.Parameter(whole.in_proj_bias[three])
        cut.out_proj = copy.deepcopy(whole.out_proj)
        cut.out_proj.weight = nn.Parameter(whole.out_proj.weight[:, rows])
        cut.num_heads = 2
    compare(cut(*x, need_weights=False), whole(*x, need_weights=False))
    assert cut(*x, average_attn_weights=False)[1].shape == (B, 2, T, T)
    assert torch.allclose(
        cut(*x, average_attn_weights=False)[1], whole(*x, average_attn_weights=False)[1][:, heads]
    )


def test_narrower_heads_keep_the_scale() -> None:
    """Cutting a channel of all heads equals setting it to zero: the softmax scale does not change."""
    whole, _ = pair()
    x, width = inputs(whole, "self"), E // H
    rows = torch.arange(0, E, width)  # the first channel of each head
    three = torch.cat([rows + k * E for k in range(3)])
    with torch.no_grad():
        gone = torch.ones(3 * E, dtype=torch.bool)
        gone[three] = False
        whole.in_proj_weight[gone] = 0
        whole.in_proj_bias[gone] = 0
        cut = Attention(whole)
        cut.in_proj_weight = nn.Parameter(whole.in_proj_weight[three])
        cut.in_proj_bias = nn.Parameter(whole.in_proj_bias[three])
        cut.out_proj = copy.deepcopy(whole.out_proj)
        cut.out_proj.weight = nn.Parameter(whole.out_proj.weight[:, rows])
        cut.head_dim = 1
    compare(cut(*x), whole(*x))
    compare(cut(*x, need_weights=False), whole(*x, need_weights=False))


@pytest.mark.parametrize("what", ["plain", "bias kv", "zero", "widths"])
def test_copy_pickle_export_and_functional_call(what: str) -> None:
    theirs, ours = pair(**OPTIONS[what])
    x = inputs(theirs, "three")
    want = ours(*x)
    compare(copy.deepcopy(ours)(*x), want)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    compare(torch.load(file, weights_only=False)(*x), want)
    compare(functional_call(ours, dict(ours.named_parameters()), x), want)
    doubled = {name: value * 2 for name, value in ours.state_dict().items()}
    compare(functional_call(ours, doubled, x), functional_call(theirs, doubled, x))
    exported = torch.export.export(ours, x).module()
    compare(exported(*x), want)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a hint alone": ({"is_causal": True}, "is_causal is only a hint about attn_mask; give attn_mask too"),
    "integers": ({"attn_mask": torch.ones(T, S, dtype=torch.int64)}, "attn_mask has dtype torch.int64, but"),
    "a row": (
        {"attn_mask": torch.ones(1, S, dtype=torch.bool)},
        r"attn_mask has shape \[1, 5\], but it must be \[4, 5\]",
    ),
    "heads": (
        {"attn_mask": torch.ones(B, T, S) > 2},
        r"has shape \[3, 4, 5\], but it must be \[4, 5\] or \[12, 4, 5\]",
    ),
    "padding": (
        {"key_padding_mask": torch.ones(1, S) > 2},
        r"key_padding_mask has shape \[1, 5\], but it must be \[3, 5\]",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_masks_are_refused(what: str) -> None:
    call, says = REFUSED[what]
    theirs, ours = pair()
    with pytest.raises(RefusedError, match=says):
        ours(*inputs(theirs, "three"), **call)


def test_nested_tensors_are_refused() -> None:
    _, ours = pair(batch_first=True)
    parts = [torch.randn(2, E), torch.randn(3, E)]
    x = torch.nested.nested_tensor(parts, dtype=torch.float64, layout=torch.jagged)
    with pytest.raises(RefusedError, match="nested tensors are not supported"):
        ours(x, x, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    theirs, _ = pair()
    theirs = theirs.to(dtype)
    ours = Attention(theirs)
    x = tuple(each.to(dtype) for each in inputs(theirs, "three"))
    mask = masks(T, S)["bool"]
    for need in (True, False):
        got, want = ours(*x, **mask, need_weights=need)[0], theirs(*x, **mask, need_weights=need)[0]
        assert got.dtype is dtype
        room = 20 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= room
