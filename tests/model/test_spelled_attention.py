"""Spelled attention: the same numbers as torch's function, with the probabilities in reach."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.edges import edges_of
from tersor.model.observe import observed, values_of
from tersor.model.simulate import gridded
from tersor.model.spelled_attention import spelled_attention
from tersor.model.task import Task

B, H, T, S, D, E = 2, 4, 5, 7, 8, 3
SEEN = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(0)) > 0.5
SEEN[0, 0, 2] = False  # a query that sees nothing
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": SEEN},
    "half": {"attn_mask": torch.zeros(T, S, dtype=torch.float64).masked_fill(~SEEN[0, 0], -torch.inf)},
    "least": {"attn_mask": torch.zeros(T, S, dtype=torch.float64).masked_fill(~SEEN[1, 0], -1e300)},
    "bias": {"attn_mask": torch.linspace(-3, 3, S, dtype=torch.float64).expand(T, S)},
    "grouped": {"enable_gqa": True},
}


def given(heads: int = H) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    shapes = (H, T, D), (heads, S, D), (heads, S, E)
    return [torch.randn(B, *shape, generator=draws, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_function_itself(name: str) -> None:
    q, k, v = given(2 if name == "grouped" else H)
    shown: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        shown.append(x)
        return x

    out = spelled_attention(seen, q, k, v, **CALLS[name])
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, **CALLS[name]), rtol=0, atol=1e-12)
    (inside,) = shown
    assert inside.shape == (B, H, T, S)
    assert torch.allclose(inside.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    assert not spelled_attention(torch.zeros_like, q, k, v, **CALLS[name]).any()


def test_without_heads_and_with_dropout() -> None:
    q, k, v = (x[0, 0].float() for x in given())
    call = partial(spelled_attention, lambda x: x)
    assert torch.allclose(call(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)
    torch.manual_seed(0)
    many = torch.stack([call(q, k, v, None, 0.3) for _ in range(2000)]).mean(0)
    assert torch.allclose(many, F.scaled_dot_product_attention(q, k, v), atol=0.1)


class Attends(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query=q, key=k, value=v) + q.sum()


def test_its_inside_is_an_edge_for_ranges_and_grids() -> None:
    q, k, v = (x.float() for x in given())
    v = v[..., :1].expand(-1, -1, -1, D)
    name = "/attention:0<softmax"
    task = Task("attends", evaluate=[(q, k, v)], calibrate=[(q, k, v)], feed=lambda net, batch: net(*batch))
    least, most = values_of(Attends(), task, [name])[name].range()  # type: ignore[misc]
    scores = (q @ k.transpose(2, 3) / D**0.5).softmax(3)
    assert least == 0
    assert torch.allclose(most, scores.max().double(), atol=1e-6)
    assert name not in edges_of(Attends(), q, k, v)  # a name only where it is asked for
    grids = observed(Attends(), task, [name, "/attention:0<1"])
    steps = {key: float(grid.scale.decode()) for key, grid in grids.items()}
    p, zero = steps[name], float(grids["/attention:0<1"].zero.decode())
    codes = ((k / steps["/attention:0<1"]).round() + zero).clamp(0, 255) - zero
    scores = (q @ (codes * steps["/attention:0<1"]).transpose(2, 3) / D**0.5).softmax(3)
    wanted = ((scores / p).round().clamp(0, 255) * p) @ v + q.sum()
    assert torch.allclose(gridded(Attends(), grids)(q, k, v), wanted, atol=1e-5)
    assert not torch.allclose(Attends()(q, k, v), wanted, atol=1e-5)
