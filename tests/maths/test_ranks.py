"""Low-rank factors against theoretical bounds, and against random and fitted factors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.maths.ranks import energy_error, rank_for_energy, rank_for_keep, svd_factors, whitened_factors

shapes = st.sampled_from([(1, 1), (7, 1), (1, 7), (5, 9), (9, 5), (6, 6)])


def matrix(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(columns, seed, rank=None):
    """A second moment with unequal eigenvalues, of full or lower rank."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(50, rank or columns, generator=g) * torch.logspace(0, -2, rank or columns)
    x = x @ torch.randn(rank or columns, columns, generator=g)
    return x.T @ x / 50


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 50), st.integers(1, 9))
def test_svd_error_is_the_tail_of_the_spectrum(shape, seed, rank):
    w, rank = matrix(shape, seed), min(rank, *shape)
    left, right = svd_factors(w, rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    tail = torch.linalg.svdvals(w)[rank:].square().sum()
    assert math.isclose((w - left @ right).square().sum(), tail, rel_tol=1e-4, abs_tol=1e-8)
    assert torch.allclose(left.square().sum(0), right.square().sum(1), rtol=1e-4, atol=1e-6)


def test_svd_beats_random_and_fitted_factors():
    w = matrix((8, 6), 0)
    best = energy_error(w, *svd_factors(w, 2))
    for seed in range(50):
        right = matrix((2, 6), seed)
        left = torch.linalg.lstsq(right.T, w.T).solution.T  # the best left for that right
        assert energy_error(w, left, right) >= best - 1e-6


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("deficient", [None, 3, 1])
def test_whitened_is_best_for_the_data(rank, deficient):
    w, gram = matrix((8, 6), 1), moment(6, 2, deficient)
    best = energy_error(w, *whitened_factors(w, gram, rank), gram)
    plain = energy_error(w, *svd_factors(w, rank), gram)
    assert best <= plain + 1e-9
    if deficient is None:
        assert best < plain * 0.9
        a = torch.linalg.cholesky(gram.double())
        tail = torch.linalg.svdvals(w.double() @ a)[rank:].square().sum()
        whole = (w.double() @ a).square().sum()
        assert math.isclose(best, tail / whole, rel_tol=1e-3)
    elif rank >= deficient:
        assert best < 1e-6
    for seed in range(20):
        right = matrix((rank, 6), seed)
        c = gram.double() + 1e-12 * torch.eye(6)
        left = w.double() @ c @ right.T.double() @ torch.linalg.pinv(right.double() @ c @ right.T.double())
        assert energy_error(w, left, right, gram) >= best - 1e-7


def test_whitened_error_equals_the_error_on_samples():
    x = matrix((500, 6), 3) @ matrix((6, 6), 4)
    w = matrix((5, 6), 5)
    left, right = whitened_factors(w, x.T @ x / 500, 3)
    y, z = x @ w.T, x @ right.T @ left.T
    assert math.isclose(
        energy_error(w, left, right, x.T @ x / 500), (y - z).square().sum() / y.square().sum(), rel_tol=1e-3
    )


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 50), st.sampled_from(["same", "zero", "full"]))
def test_whitened_is_balanced_and_full_rank_is_exact(shape, seed, kind):
    w = matrix(shape, seed)
    columns = shape[1]
    gram = {"same": torch.eye(columns), "zero": torch.zeros(columns, columns), "full": moment(columns, seed)}[
        kind
    ]
    left, right = whitened_factors(w, gram, min(shape))
    assert torch.allclose(left @ right, w, atol=1e-4)
    assert torch.allclose(left.square().sum(0), right.square().sum(1), rtol=1e-3, atol=1e-5)
    if kind != "full" and min(shape) > 1:
        mine, plain = (energy_error(w, *f) for f in (whitened_factors(w, gram, 1), svd_factors(w, 1)))
        assert math.isclose(mine, plain, rel_tol=1e-5)


def test_dtype_and_zeros():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        left, right = svd_factors(matrix((4, 5), 0).to(dtype), 2)
        assert left.dtype == right.dtype == dtype
    left, right = svd_factors(torch.zeros(3, 4), 2)
    assert not (left @ right).any()
    assert energy_error(torch.zeros(3, 4), left, right) == 0


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 50), st.floats(0.01, 1))
def test_rank_for_energy_is_the_least(shape, seed, energy):
    w = matrix(shape, seed)
    rank = rank_for_energy(w, energy)
    assert energy_error(w, *svd_factors(w.double(), rank)) <= 1 - energy + 1e-9
    if rank > 1:
        assert energy_error(w, *svd_factors(w.double(), rank - 1)) > 1 - energy - 1e-9


def test_rank_for_energy_ignores_empty_ranks():
    assert rank_for_energy(matrix((8, 2), 0).double() @ matrix((2, 9), 1).double(), 1.0) == 2
    assert rank_for_energy(torch.zeros(3, 4), 1.0) == 1


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.001, 1))
def test_rank_for_keep_is_the_largest(o, i, keep):
    rank = rank_for_keep(o, i, keep)
    assert 1 <= rank <= min(o, i)
    assert rank == 1 or rank * (o + i) <= keep * o * i * (1 + 1e-9)
    assert (rank + 1) * (o + i) > keep * o * i * (1 - 1e-9)


def test_rank_for_keep_counts_exactly():
    assert rank_for_keep(300, 784, 0.5) == 108
    assert rank_for_keep(4, 4, 0.5) == 1
    assert rank_for_keep(20, 20, 0.1) == 1
    assert rank_for_keep(10, 10, 0.6) == 3


def test_refusals():
    w = torch.ones(3, 4)
    with pytest.raises(SettingError, match="ranks 1 to 3"):
        svd_factors(w, 4)
    with pytest.raises(SettingError, match=r"\[4, 4\]"):
        whitened_factors(w, torch.eye(3), 1)
    with pytest.raises(SettingError, match="finite"):
        svd_factors(w * math.nan, 1)
    with pytest.raises(SettingError, match="energy=1.5"):
        rank_for_energy(w, 1.5)
    with pytest.raises(SettingError, match="keep=0"):
        rank_for_keep(3, 4, 0)
