"""Passing: the operators in the tables keep every NaN, and those that should treat all units alike do."""

import pytest
import torch
from torch import Tensor

from tersor.model.nan_rules import EACH, OTHERS, PASSING, POOLS, RESHAPES

aten = torch.ops.aten
W = 9  # not divisible by the vector width of processors
SHAPE = (2, 4, W, W)
# Arguments of an operator after a tensor [2, 4, W, W]; "two" is replaced by a second tensor.
MORE = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "maximum", "minimum"), ("two",)),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), (-0.5,)),
    **{name: (0.5, False) for name in EACH if "dropout" in name},
    "to": (torch.float64,), "prelu": (torch.rand(4),),
    "view": ((2, -1),), "_unsafe_view": ((2, -1),), "reshape": ((2, -1),), "unflatten": (1, (2, 2)),
    "squeeze": (0,), "unsqueeze": (0,), "softmax": (1,), "log_softmax": (1,), "glu": (1,), "cumsum": (1,),
    "mean": ((1, 3),), "sum": ((1, 3),), "amax": ((1, 3),), "amin": ((1, 3),),
    "batch_norm": (None, None, torch.zeros(4), torch.ones(4), False, 0.1, 1e-5, False),
    "layer_norm": ((W,),), "rms_norm": ((W,),), "group_norm": (2,),
    "instance_norm": (None, None, None, None, True, 0.1, 1e-5, False),
    "index_select": (1, torch.arange(4)), "gather": (1, torch.arange(4).view(1, 4, 1, 1).expand(SHAPE)),
    "repeat": ((1, 2, 1, 1),), "roll": ((1,), (1,)), "flip": ((1,),),
    "pixel_shuffle": (2,), "channel_shuffle": (2,),
}  # fmt: skip


def call(name: str, x: Tensor) -> Tensor:
    if name in POOLS:
        axes = POOLS[name]
        x = x.reshape((2, 4, W, W) if axes == 2 else (2, 4, W * W) if axes == 1 else (1, 2, 4, W, W))
        size = [1] * (axes - 1) + [3]
        out = getattr(aten, name)(x, size)
        return out[0] if isinstance(out, tuple) else out
    if name in ("cat", "stack"):
        return getattr(aten, name)([x, torch.zeros(SHAPE)])
    if name == "where":
        return aten.where(torch.ones(SHAPE, dtype=torch.bool), x, torch.zeros(SHAPE))
    if name == "masked_fill":
        return aten.masked_fill(x, torch.zeros(SHAPE, dtype=torch.bool), 0.0)
    if name == "index":
        return aten.index(x, [None, torch.arange(4)])
    if name.startswith("upsample"):
        axes = int(name[-2])
        x = x.reshape((2, 4, W, W) if axes == 2 else (2, 4, W * W) if axes == 1 else (1, 2, 4, W, W))
        return getattr(aten, name)(x, [2 * size for size in x.shape[2:]])
    if name == "copy":
        return torch.zeros(SHAPE).copy_(x)
    more = [torch.zeros(SHAPE) if item == "two" else item for item in MORE.get(name, ())]
    return getattr(aten, name)(x, *more)


ERASES = {"tril", "triu", "fill", "zero"}  # overwrite known elements; NaN elsewhere is kept


@pytest.mark.parametrize("name", sorted(PASSING - ERASES))
def test_a_nan_is_kept_at_every_position(name: str) -> None:
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) + 0.1
    assert not call(name, x.clone()).isnan().any()
    places = range(0, x.numel(), 7) if name not in POOLS else range(x.numel())
    if name.startswith("max_pool") or name.startswith("avg_pool"):
        places = [k for k in places if k % W < 3 * (W // 3)]  # the pools' last window is full here
    for place in places:
        asked = x.clone()
        asked.view(-1)[place] = torch.nan
        assert call(name, asked).isnan().any(), place
    assert call(name, torch.full(SHAPE, torch.nan)).isnan().any()


@pytest.mark.parametrize("name", sorted(PASSING - ERASES))
def test_elements_without_nan_depend_on_no_nan(name: str) -> None:
    """With any number in place of a NaN, the elements that were not NaN stay the same."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(SHAPE, generator=g) + 0.1
    some = torch.rand(SHAPE, generator=g) < 0.02
    known = call(name, x.masked_fill(some, torch.nan))
    for _ in range(3):
        out = call(name, torch.where(some, torch.randn(SHAPE, generator=g), x))
        same = (out == known) | known.isnan() | out.isnan()
        torch.testing.assert_close(out[~same], known[~same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(EACH | {name for name, axes in POOLS.items() if axes < 3}))
def test_units_are_treated_alike(name: str) -> None:
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) + 0.1
    more = {"add": (2.0,), "sub": (2.0,), "rsub": (2.0,), "mul": (2.0,), "div": (2.0,)}
    index = torch.tensor([2, 0, 3, 1])

    def out(y: Tensor) -> Tensor:
        return getattr(aten, name)(y, *more[name]) if name in more else call(name, y)

    torch.testing.assert_close(out(x[:, index]), out(x)[:, index], rtol=1e-6, atol=1e-7)


def test_the_tables_do_not_overlap() -> None:
    assert len(PASSING) == sum(map(len, (EACH, POOLS, RESHAPES, OTHERS)))
    assert all(hasattr(aten, name) or hasattr(aten, f"{name}_") for name in PASSING)
