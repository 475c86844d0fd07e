"""Logarithmic grids against the papers' level sets, a slow nearest search and a dense scan of scales."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.maths.levels import from_levels, log_grid, log_levels, to_levels
from tersor.maths.units import PER, TINY


def test_powers_of_two():
    assert log_levels(2, 1).tolist() == [0, 1]
    assert log_levels(4, 1).tolist() == [0, 2**-6, 2**-5, 2**-4, 2**-3, 0.25, 0.5, 1]
    assert log_levels(8, 1)[1] == 2.0**-126


def test_sums_of_two_are_the_papers():
    # Li, Dong, Wang 2020, equation 5 with k=2, n=2: the 4-bit magnitudes.
    p, q = [0, 1, 2**-2, 2**-4], [0, 2**-1, 2**-3, 2**-5]
    want = sorted((x + y) / 1.5 for x in p for y in q)
    assert torch.allclose(log_levels(5, 2), torch.tensor(want))
    # The 3-bit magnitudes of the authors' code: {0, 1/2, 1/4, 1/16} + {0, 1/8}.
    want = sorted((x + y) / 0.625 for x in [0, 0.5, 0.25, 0.0625] for y in [0, 0.125])
    assert torch.allclose(log_levels(4, 2), torch.tensor(want))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("terms", [1, 2])
def test_level_sets_are_sorted_and_full(bits, terms):
    levels = log_levels(bits, terms)
    assert len(levels) == 2 ** (bits - 1)
    assert levels[0] == 0
    assert levels[-1] == 1
    assert (levels.diff() > 0).all()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([(1, 1), (7, 1), (1, 7), (5, 13)]),
    st.sampled_from([0.0, 1e-41, 1e-20, 1.0, 1e38]),
    st.integers(2, 8),
    st.sampled_from([1, 2]),
    st.sampled_from(PER),
    st.sampled_from(["minmax", "mse"]),
    st.integers(0, 100),
)
def test_each_weight_goes_to_the_nearest_level(shape, size, bits, terms, per, range_, seed):  # noqa: PLR0917
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2) * size
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7 if seed % 2 else None
    codes, scale = log_grid(w, bits, terms=terms, per=per, group=4, range=range_, keep=keep)
    want = {"tensor": (1, 1), "channel": (shape[0], 1), "group": (shape[0], math.ceil(shape[1] / 4))}[per]
    assert tuple(scale.shape) == want
    assert (scale >= TINY).all()
    decoded = from_levels(codes, scale, bits, terms, 4)
    assert torch.isfinite(decoded).all()
    assert torch.equal(codes, to_levels(w, scale, bits, terms, 4))
    assert int(codes.abs().max()) < 2 ** (bits - 1)
    levels = log_levels(bits, terms).double().tolist()
    for r in range(shape[0]):
        for c in range(shape[1]):
            s = scale[r if per != "tensor" else 0, c // 4 if per == "group" else 0].item()
            value = w[r, c].double().item()
            gap = abs(abs(value) - levels[abs(int(codes[r, c]))] * s)
            assert gap <= min(abs(abs(value) - level * s) for level in levels) + s * 1e-6
            assert int(codes[r, c]) * value >= 0
            assert math.isclose(
                decoded[r, c],
                math.copysign(levels[abs(int(codes[r, c]))] * s, value),
                rel_tol=1e-5,
                abs_tol=1e-44,
            )


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("terms", [1, 2])
def test_mse_is_near_the_best_of_a_dense_scan(bits, terms):
    w = torch.randn(6, 77, generator=torch.Generator().manual_seed(bits)) * 0.1
    got, plain = (
        (from_levels(*log_grid(w, bits, terms=terms, range=r), bits, terms, 64) - w).square().sum(1)
        for r in ("mse", "minmax")
    )
    assert (got <= plain * (1 + 1e-6)).all()
    factors = torch.linspace(0.02, 1.5, 1500)[:, None, None]
    scale = (w.abs().amax(1, keepdim=True) * factors).reshape(-1, 1)
    many = w.repeat(1500, 1)
    decoded = from_levels(to_levels(many, scale, bits, terms, 64), scale, bits, terms, 64)
    best = (decoded - many).square().sum(1).reshape(1500, 6).amin(0)
    assert (got <= best * 1.03).all()


def test_masked_weights_do_not_influence_the_grid():
    w = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(w, dtype=torch.bool)
    keep[:, 9] = False
    loud = w.clone()
    loud[:, 9] = -1e5
    for per in PER:
        a, b = (log_grid(v, 4, per=per, group=4, keep=keep)[1] for v in (w, loud))
        assert torch.equal(a, b)


def test_refusals():
    w = torch.ones(2, 2)
    with pytest.raises(SettingError, match="bits=9, but 2 to 8"):
        log_grid(w, 9)
    with pytest.raises(SettingError, match="terms=3"):
        log_grid(w, 4, terms=3)
    with pytest.raises(SettingError, match="Allowed: minmax, mse"):
        log_grid(w, 4, range="percentile")
