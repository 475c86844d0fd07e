"""Observe: ranges agree with those that hooks record, and grids span them."""

from typing import Any

import pytest
import torch
from nets import nets
from tiny import tiny
from torch import Tensor

from tersor.errors import RefusedError, SettingError, SiteError
from tersor.model.observe import grid_of, observed, ranges_of
from tersor.model.task import Task


def outputs_of(name: str, layer: str) -> Tensor:
    """A layer's outputs for all calibration batches, from a plain hook."""
    t, seen = tiny(name), []
    hook = t.model.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        for batch in t.task.batches("calibrate"):
            t.task.run(t.model, batch)
    hook.remove()
    return torch.cat(seen)


def test_ranges_are_those_of_all_batches_with_zero() -> None:
    t, seen = tiny("conv"), outputs_of("conv", "norm0")
    names = ["norm0/batch_norm:0", "/relu:0"]
    ranges = ranges_of(t.model, t.task, names)
    assert list(ranges) == names
    assert [float(end) for end in ranges["norm0/batch_norm:0"]] == [float(seen.min()), float(seen.max())]
    assert [float(end) for end in ranges["/relu:0"]] == [0.0, float(seen.max())]
    low, high = ranges_of(t.model, t.task, ["norm0/batch_norm:0"], axis=1)["norm0/batch_norm:0"]
    assert torch.equal(low, seen.amin((0, 2, 3)).double().clamp_max(0))
    assert torch.equal(high, seen.amax((0, 2, 3)).double().clamp_min(0))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 9, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("ends", [(-1.0, 3.0), (0.0, 2.5), (-2.0, 0.0), (0.0, 0.0), (-1e-30, 1e30)])
def test_a_grid_spans_its_range(bits: int, signed: bool, ends: tuple[float, float]) -> None:
    grid = grid_of(tuple(torch.tensor([end], dtype=torch.float64) for end in ends), bits=bits, signed=signed)
    scale, zero = float(grid.scale.decode()), int(grid.zero.decode())
    first = -(2 ** (bits - 1)) if signed else 0
    assert first <= zero < first + 2**bits
    if bits > 1:  # one bit holds 0 and one end
        assert (first - zero) * scale <= ends[0] + scale * 0.501
        assert (first + 2**bits - 1 - zero) * scale >= ends[1] - scale * 0.501
        assert scale * (2**bits - 1) <= max(ends[1] - ends[0], 1e-30) * (1 + 1e-6)


def test_signed_and_unsigned_codes_decode_to_the_same() -> None:
    found = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    a, b = grid_of(found, bits=8), grid_of(found, bits=8, signed=True)
    assert torch.equal(a.scale.decode(), b.scale.decode())
    assert int(a.zero.decode()) - 128 == int(b.zero.decode())


def test_observed_grids_are_per_edge_or_per_channel() -> None:
    t = tiny("conv")
    whole = observed(t.model, t.task, ["/input:x", "/add:0"], bits=4)
    assert {name: (grid.bits, tuple(grid.scale.shape)) for name, grid in whole.items()} == {
        "/input:x": (4, (1,)), "/add:0": (4, (1,))
    }  # fmt: skip
    channels = observed(t.model, t.task, ["/add:0"], axis=1, signed=True)["/add:0"]
    assert (tuple(channels.scale.shape), channels.axis, channels.signed) == ((7,), 1, True)


def test_edges_that_cannot_be_observed_are_refused() -> None:
    t = tiny("conv")
    with pytest.raises(SiteError, match=r"no batch reaches the edge '/add:1'; did you mean '/add:0'"):
        ranges_of(t.model, t.task, ["/add:1"])
    with pytest.raises(SettingError, match="axis=4, but the edge has axes 0 to 3"):
        ranges_of(t.model, t.task, ["/add:0"], axis=4)
    a = tiny("attention")
    with pytest.raises(RefusedError, match=r"/add:1: the edge holds infinite or NaN values"):
        ranges_of(a.model, a.task, ["/add:1"])  # attention scores plus a mask of -inf


def test_inputs_by_keyword_and_the_users_own_feed() -> None:
    model, args, kwargs = nets()["nested"]
    task = Task("nested", evaluate=[0], calibrate=[0], feed=lambda net, batch: net(*args, **kwargs)["sum"])
    ranges: Any = ranges_of(model, task, ["/input:extra.bias", "/input:pair.1"])
    assert float(ranges["/input:extra.bias"][1]) == float(kwargs["extra"]["bias"].max().clamp_min(0))
    assert float(ranges["/input:pair.1"][0]) == float(args[0][1].min())


def test_observing_does_not_change_the_model() -> None:
    t = tiny("conv")
    t.model.train()
    random = torch.get_rng_state()
    observed(t.model, t.task, ["/add:0"])
    assert t.model.training
    assert int(t.model.norm0.num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in t.model.modules())
