"""Masks against slow loops over sorted Python lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.maths.scores import cubic, global_keep, lamp_scores, magnitude_keep, n_m_keep, threshold_keep

# Few distinct values, so that ties are frequent.
shapes = st.tuples(st.integers(1, 7), st.integers(1, 9))
shares = st.floats(0.01, 1)


def matrix(shape, seed, ties=True):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=g).float() if ties else torch.randn(shape, generator=g)


def slow_largest(values, count):
    """The first `count` by decreasing |value|, then by index."""
    order = sorted(range(len(values)), key=lambda k: (-abs(values[k]), k))
    return [k in order[:count] for k in range(len(values))]


def half_up(x):
    return math.floor(x + 0.5)


@settings(max_examples=200, deadline=None)
@given(
    shapes,
    st.integers(0, 99),
    shares,
    st.sampled_from(["tensor", "channel", "group"]),
    st.integers(1, 10),
    st.booleans(),
)
def test_magnitude_matches_a_slow_loop(shape, seed, keep, per, group, ties):  # noqa: PLR0917
    w = matrix(shape, seed, ties)
    got = magnitude_keep(w, keep, per, group)
    flat = w.flatten().tolist()
    if per == "tensor":
        want = slow_largest(flat, max(1, half_up(keep * len(flat))))
    else:
        size = shape[1] if per == "channel" else group
        want = []
        for row in w.tolist():
            for a in range(0, len(row), size):
                block = row[a : a + size]
                want += slow_largest(block, half_up(keep * len(block)))
        if not any(want):
            want = slow_largest(flat, 1)
    assert got.dtype == torch.bool
    assert got.flatten().tolist() == want


@settings(max_examples=100, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), st.integers(0, 99), shares)
def test_global_equals_one_concatenated_list(shapes, seed, keep):
    ws = [matrix(shape, seed + k) for k, shape in enumerate(shapes)]
    got = global_keep(ws, keep)
    flat = torch.cat([w.flatten() for w in ws]).tolist()
    assert [g.shape for g in got] == [w.shape for w in ws]
    want = slow_largest(flat, max(1, half_up(keep * len(flat))))
    assert torch.cat([g.flatten() for g in got]).tolist() == want


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(1, 6), st.integers(0, 5))
def test_n_of_m_matches_a_slow_loop(shape, seed, n, more):
    w, m = matrix(shape, seed), n + more
    want = []
    for row in w.tolist():
        for a in range(0, len(row), m):
            block = row[a : a + m]
            want += slow_largest(block, math.ceil(n * len(block) / m))
    assert n_m_keep(w, n, m).flatten().tolist() == want


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 99), st.sampled_from([1.0, 1e-30, 1e30]))
def test_lamp_matches_its_formula(shape, seed, size):
    w = matrix(shape, seed, ties=False)
    got = lamp_scores(w * size).flatten()
    flat = w.flatten().double().tolist()
    for k, value in enumerate(flat):
        want = value**2 / sum(v**2 for v in flat if abs(v) >= abs(value))
        assert math.isclose(got[k], want, rel_tol=1e-5)
    assert got.max() == 1


def test_lamp_keeps_a_weight_of_each_layer():
    layers = [torch.randn(4, 5, generator=torch.Generator().manual_seed(k)) * 10.0**-k for k in range(4)]
    assert not global_keep(layers, 0.2)[3].any()
    masks = global_keep([lamp_scores(w) for w in layers], 0.2)
    assert sum(int(m.sum()) for m in masks) == 16
    assert all(m.any() for m in masks)
    assert lamp_scores(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_threshold():
    w = torch.tensor([[0.0, -0.5, 0.4]])
    assert threshold_keep(w, 0.5).tolist() == [[False, True, False]]
    assert threshold_keep(w, 0).all()


def test_cubic_equals_the_paper():
    assert cubic(0, 5, 25, 1.0, 0.1) == 1.0
    assert cubic(25, 5, 25, 1.0, 0.1) == cubic(99, 5, 25, 1.0, 0.1) == 0.1
    for step in range(5, 26):
        sparsity = 0.9 + (0.0 - 0.9) * (1 - (step - 5) / 20) ** 3  # Zhu, Gupta 2017, equation 1
        assert math.isclose(cubic(step, 5, 25, 1.0, 0.1), 1 - sparsity)
    assert cubic(3, 3, 3, 1.0, 0.5) == 0.5


def test_refusals():
    w = torch.ones(2, 2)
    for keep in (0, -1, 1.5, math.nan):
        with pytest.raises(SettingError, match="0 < keep <= 1"):
            magnitude_keep(w, keep)
        with pytest.raises(SettingError, match="0 < keep <= 1"):
            global_keep([w], keep)
    with pytest.raises(SettingError, match="1 <= n <= m"):
        n_m_keep(w, 5, 4)
    with pytest.raises(SettingError, match="0 or more"):
        threshold_keep(w, -0.1)
