"""k-means against all partitions, a quadratic dynamic program, and Lloyd in loops."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.maths import kmeans
from tersor.maths.exact_kmeans import optimal_cuts
from tersor.maths.kmeans import INITS, assign, cluster

floats = st.floats(-1e3, 1e3, width=32)


def error(values, index, book, weights=None) -> float:
    gap = (values.double() - book.double()[index]).square()
    return float((gap if weights is None else gap * weights).sum())


def brute(values: list[float], weights: list[float], entries: int) -> float:
    """The least error over all ways to cut the sorted values."""
    pairs = sorted(zip(values, weights, strict=True))
    x, w = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), min(entries, len(x)) - 1):
        total = 0.0
        for a, b in itertools.pairwise([0, *cuts, len(x)]):
            mass = w[a:b].sum()
            if mass:
                mean = (w[a:b] * x[a:b]).sum() / mass
                total += (w[a:b] * (x[a:b] - mean) ** 2).sum()
        best = min(best, total)
    return best


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(floats, st.integers(0, 3)), min_size=1, max_size=9), st.integers(1, 4), st.booleans()
)
def test_exact_is_the_best_of_all_partitions(pairs, entries, weighted):
    values = torch.tensor([p[0] for p in pairs])
    weights = torch.tensor([float(p[1]) for p in pairs]) if weighted else None
    if weighted and not weights.any():
        return
    index, book = cluster(values, entries, weights=weights)
    got = error(values, index, book, weights)
    want = brute([p[0] for p in pairs], [1.0] * len(pairs) if weights is None else weights.tolist(), entries)
    assert got <= want + 1e-6 * (1 + float(values.double().square().sum()))


def quadratic(x: np.ndarray, entries: int) -> float:
    """The same dynamic program without the divide and conquer."""
    n = len(x)
    s1, s2 = (np.concatenate([[0], (x**p).cumsum()]) for p in (1, 2))
    i, j = np.arange(n + 1)[:, None], np.arange(n + 1)[None]
    with np.errstate(all="ignore"):
        cost = np.where(j < i, s2[i] - s2[j] - (s1[i] - s1[j]) ** 2 / (i - j), np.inf)
    best = cost[:, 0].copy()
    best[0] = 0
    for _ in range(entries - 1):
        best = (best[None] + cost).min(1)
    return best[n]


@pytest.mark.parametrize("entries", [2, 3, 7, 16, 64])
@pytest.mark.parametrize("kind", ["normal", "uniform", "cauchy"])
def test_exact_matches_the_quadratic_program(entries, kind):
    draw = np.random.default_rng(entries)
    kinds = {"normal": draw.standard_normal, "uniform": draw.random, "cauchy": draw.standard_cauchy}
    values = torch.from_numpy(kinds[kind](301)).float()
    index, book = cluster(values, entries)
    assert len(book) == entries
    x = np.sort(values.double().numpy())
    want = quadratic(x - x.mean(), entries)
    assert error(values, index, book) == pytest.approx(want, rel=1e-4)


def test_values_far_from_zero_lose_no_precision():
    x = np.sort(np.random.default_rng(0).random(200))
    weight = np.ones(200)
    assert np.array_equal(optimal_cuts(x + 1e7, weight, 20), optimal_cuts(x, weight, 20))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(floats, min_size=1, max_size=60),
    st.integers(1, 12),
    st.sampled_from(INITS),
    st.sampled_from([0, 1, 50]),
    st.sampled_from([1.0, 1e-38, 1e33]),
)
def test_every_init_gives_a_valid_codebook(values, entries, start, iterations, size):
    values = torch.tensor(values) * size
    index, book = cluster(values, entries, init=start, iterations=iterations)
    assert index.dtype == torch.int64
    assert book.dtype == torch.float32
    assert 1 <= len(book) <= entries
    assert (book.diff() > 0).all()
    assert torch.isfinite(book).all()
    near = (values.double()[:, None] - book.double()).abs()
    assert torch.equal(near.gather(1, index[:, None])[:, 0], near.amin(1))
    if len(values.unique()) <= entries:
        assert torch.equal(book[index], values + 0.0)


@pytest.mark.parametrize("start", ["linear", "density", "kmeans++"])
def test_inits_converge_to_a_fixed_point_near_the_optimum(start):
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    index, book = cluster(values, 16, init=start, iterations=500)
    means = torch.stack([values[index == k].double().mean() for k in range(16)])
    assert torch.allclose(book.double(), means, atol=1e-6)
    assert error(values, index, book) <= error(values, *cluster(values, 16)) * 1.25


def test_lloyd_is_plain_lloyd():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    book = torch.linspace(values.min(), values.max(), 6, dtype=torch.float64)
    for _ in range(7):
        index = (values.double()[:, None] - book).abs().argmin(1)
        book = torch.stack([values.double()[index == k].mean() for k in range(6)])
    _, got = cluster(values, 6, init="linear", iterations=7)
    assert torch.allclose(got.double(), book, atol=1e-6)


def test_empty_entries_are_used():
    values = torch.cat([torch.randn(500, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0])])
    index, book = cluster(values, 8, init="linear", iterations=100)
    assert len(book) == 8
    assert len(index.unique()) == 8


def test_many_values_come_within_a_percent_of_the_optimum(monkeypatch):
    values = torch.randn(30_000, generator=torch.Generator().manual_seed(0)) ** 3
    near = error(values, *cluster(values, 16))
    monkeypatch.setattr(kmeans, "DISTINCT", 50_000)
    best = error(values, *cluster(values, 16))
    assert best * (1 - 1e-9) <= near <= best * 1.001


def test_many_entries_are_near_the_asymptotic_optimum():
    values = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    index, book = cluster(values, 2048)
    assert len(book) == 2048
    assert error(values, index, book) / len(values) < 3**0.5 * torch.pi / 2 / 2048**2  # Panter, Dite 1951


def test_seed_only_affects_kmeans_plus_plus():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    books = [cluster(values, 32, init="kmeans++", iterations=2, seed=s)[1] for s in (0, 0, 1)]
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])
    assert torch.equal(state, torch.get_rng_state())


def test_assign_takes_any_shape():
    index = assign(torch.tensor([[-1.0, 0.4], [0.5, 9.0]]), torch.tensor([0.0, 1.0]))
    assert index.tolist() == [[0, 0], [0, 1]]


def test_nothing_to_cluster():
    index, book = cluster(torch.empty(0), 4)
    assert index.shape == (0,)
    assert book.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"entries": 0}, "entries=0"),
        ({"entries": 2, "init": "dense"}, "did you mean 'density'"),
        ({"entries": 2, "weights": torch.zeros(3)}, "all weights are 0"),
        ({"entries": 2, "weights": -torch.ones(3)}, "not negative"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(SettingError, match=text):
        cluster(torch.tensor([1.0, 2.0, 3.0]), **options)
