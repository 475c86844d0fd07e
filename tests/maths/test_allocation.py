"""Allocation against brute force, a hand-made example, and the cost of a real convolution."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor.errors import SettingError
from tersor.maths.allocation import Cost, Term, Width, allocate


def one(family, units=1.0, fixed=0.0):
    return Width(fixed, ((family, units),))


def brute(options, damages, total, target):
    """(least damage, its greatest cost) among all choices that fit, or None."""
    found = []
    for at in itertools.product(*(range(len(each)) for each in options)):
        counts = [each[k] for each, k in zip(options, at, strict=True)]
        if total(counts) <= target:
            damage = math.fsum(each[k] for each, k in zip(damages, at, strict=True))
            found.append((damage, -total(counts)))
    return min(found) if found else None


@st.composite
def problems(draw, blocks=False):
    """Up to four families of up to six options, and terms whose widths are sums over one or two of them."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    families = draw(st.integers(1, 4))
    options, damages = [], []
    for _ in range(families):
        size = int(random.integers(1, 7))
        options.append(sorted(random.choice(np.arange(1, 25), size, replace=False).tolist()))
        falling = np.sort(random.exponential(size=size) ** random.uniform(0.5, 3))[::-1]
        damages.append([*falling[:-1].tolist(), 0.0])
    terms = []
    for _ in range(int(random.integers(1, 2 * families + 1))):
        widths = []
        for _ in range(int(random.integers(1, 3))):
            chosen = random.choice(families, min(families, int(random.integers(1, 3))), replace=False)
            units = tuple((int(f), float(random.integers(1, 3))) for f in chosen)
            widths.append(Width(float(random.integers(0, 5)), units))
        stepped = blocks and random.random() < 0.6
        of = (lambda *widths: math.prod(math.ceil(w / 8) for w in widths)) if stepped else None
        terms.append(Term(float(random.exponential()) + 0.01, tuple(widths), of))
    cost = Cost(terms)
    full, least = (cost.total([each[k] for each in options]) for k in (-1, 0))
    return options, damages, cost, least + (full - least) * draw(st.floats(-0.1, 1.1))


def close_to_best(problem):
    options, damages, cost, target = problem
    found = allocate(*problem)
    best = brute(options, damages, cost.total, target * (1 + 1e-9))
    assert found.fits == (best is not None)
    assert found.cost == pytest.approx(cost.total(found.counts))
    picked = [each.index(n) for each, n in zip(options, found.counts, strict=True)]
    assert found.damage == pytest.approx(sum(d[k] for d, k in zip(damages, picked, strict=True)))
    if best is not None:
        assert found.cost <= target * (1 + 1e-8)
        assert found.damage <= best[0] * 1.05 + 1e-9


@settings(deadline=None, max_examples=150)
@given(problems())
def test_products_of_widths_are_near_brute_force(problem):
    close_to_best(problem)


@settings(deadline=None, max_examples=150)
@given(problems(blocks=True))
def test_stepped_costs_are_near_brute_force(problem):
    close_to_best(problem)


@settings(deadline=None, max_examples=60)
@given(problems(blocks=True), st.data())
def test_a_change_of_one_family_is_priced_as_the_total(problem, data):
    options, _, cost, _ = problem
    counts = [data.draw(st.sampled_from(each)) for each in options]
    for family, each in enumerate(options):
        along = cost.along(counts, family, np.array(each, dtype=float))
        for n, found in zip(each, along - along[0], strict=True):
            change = cost.total([*counts[:family], n, *counts[family + 1 :]])
            begin = cost.total([*counts[:family], each[0], *counts[family + 1 :]])
            assert found == pytest.approx(change - begin, abs=1e-9)


def test_multiply_accumulates_of_a_net():
    """Three convolutions, the second and third on a skip: the counts' cost is what the layers have."""
    size = 6

    def net(a, b):
        return nn.Sequential(nn.Conv2d(3, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, a, 1))

    def macs(a, b):
        layers = net(a, b)
        return sum(size * size * layer.weight.numel() for layer in layers)

    three = Width(3.0)
    cost = Cost(
        [
            Term(9 * size**2, (three, one(0))),
            Term(9 * size**2, (one(0), one(1))),
            Term(size**2, (one(1), one(0))),
        ]
    )
    assert net(5, 7)(torch.zeros(1, 3, size, size)).shape == (1, 5, size, size)
    assert cost.total((5, 7)) == macs(5, 7)
    options = [list(range(1, 33))] * 2
    # Units of the second family cost more damage: the optimum is known from all 1024 choices.
    damages = [[(32 - n) ** 2 * weight for n in range(1, 33)] for weight in (1.0, 3.0)]
    target = macs(32, 32) * 0.4
    found = allocate(options, damages, cost, target)
    assert found.fits
    assert found.cost == macs(*found.counts)
    assert 0.98 * target < found.cost <= target
    assert found.damage == brute(options, damages, lambda n: macs(*n), target)[0]
    assert found.counts[0] < found.counts[1]


def test_plateaus_are_crossed_and_not_descended_in_vain():
    """The cost falls at multiples of 16 alone: only these are kept, since 17 to 31 cost what 32 do."""
    blocks = Term(1.0, (one(0), one(1)), lambda a, b: math.ceil(a / 16) * math.ceil(b / 16))
    options = [list(range(1, 65))] * 2
    damages = [[float(64 - n) for n in range(1, 65)], [2.0 * (64 - n) for n in range(1, 65)]]
    assert allocate(options, damages, Cost([blocks]), 12)[:3] == ((48, 64), 12.0, 16.0)
    assert allocate(options, damages, Cost([blocks]), 8)[:3] == ((32, 64), 8.0, 32.0)
    assert allocate(options, damages, Cost([blocks]), 15.5).counts == (48, 64)


def test_a_cost_that_rises_when_units_go():
    """Of 16 channels and of 15 the second takes longer: it is never chosen."""
    slow = Cost([Term(1.0, (one(0),), lambda n: {16: 10.0, 15: 14.0, 8: 5.0}[int(n)])])
    assert allocate([[8, 15, 16]], [[3.0, 1.0, 0.0]], slow, 9.0).counts == (8,)
    assert allocate([[8, 15, 16]], [[3.0, 1.0, 0.0]], slow, 10.0).counts == (16,)
    assert allocate([[8, 15, 16]], [[3.0, 1.0, 0.0]], slow, 20.0).counts == (16,)


def test_no_budget_small_enough():
    cost = Cost([Term(2.0, (one(0), one(1)))])
    found = allocate([[2, 4], [3, 9]], [[1.0, 0.0], [5.0, 0.0]], cost, 11.0)
    assert found == ((2, 3), 12.0, 6.0, False)
    # The cheapest point is not the one with the fewest units.
    odd = Cost([Term(1.0, (one(0),), lambda n: {2: 9.0, 4: 6.0, 8: 12.0}[int(n)])])
    assert allocate([[2, 4, 8]], [[2.0, 1.0, 0.0]], odd, 5.0) == ((4,), 6.0, 1.0, False)
    assert allocate([[2, 4, 8]], [[2.0, 1.0, 0.0]], odd, 6.0) == ((4,), 6.0, 1.0, True)


def test_enough_for_all():
    cost = Cost([Term(1.0, (one(0), one(1)))])
    found = allocate([[2, 4], [3, 9]], [[1.0, 0.0], [5.0, 0.0]], cost, 36.0)
    assert found == ((4, 9), 36.0, 0.0, True)


def test_units_without_damage_fill_the_budget():
    cost = Cost([Term(1.0, (one(0),)), Term(1.0, (one(1),))])
    found = allocate([range(1, 101)] * 2, [[0.0] * 100] * 2, cost, 150.0)
    assert (found.cost, found.damage) == (150.0, 0.0)


def test_another_cost_can_be_given():
    """Anything with total, along and near."""

    class Largest:
        def total(self, counts):
            return float(max(counts))

        def along(self, counts, family, tried):
            rest = [n for f, n in enumerate(counts) if f != family]
            return np.maximum(tried, max(rest, default=0))

        def near(self, family):
            return range(3)

    found = allocate([range(1, 9)] * 3, [[8.0 - n for n in range(1, 9)]] * 3, Largest(), 5.0)
    assert found == ((5, 5, 5), 5.0, 9.0, True)


def large(of=None):
    """60 families of 64 options in a chain, the first also a residual stream that 30 layers read."""
    random = np.random.default_rng(1)
    options = [list(range(4, 257, 4))] * 60
    damages = []
    for _ in range(60):
        falling = random.exponential(size=64).cumsum()[::-1] * random.exponential()
        damages.append((falling - falling[-1]).tolist())
    pairs = [(f, f + 1) for f in range(59)] + [(0, f) for f in range(0, 60, 2)]
    terms = [Term(float(random.integers(9, 900)), (one(a), one(b)), of) for a, b in pairs]
    return options, damages, Cost(terms)


@pytest.mark.parametrize("of", [None, lambda a, b: math.ceil(a / 16) * math.ceil(b / 16)])
def test_large_problems_are_quick(of):
    options, damages, cost = large(of)
    target = cost.total([256] * 60) * 0.5
    begin = time.process_time()
    found = allocate(options, damages, cost, target)
    assert time.process_time() - begin < 4  # 0.5 to 1 s on a 2.6 GHz core
    assert found == allocate(options, damages, cost, target)
    assert found.fits
    assert 0.998 * target < found.cost <= target
    # Keeping the same share of every family is far worse.
    alike = max(n for n in options[0] if cost.total([n] * 60) <= target)
    assert found.damage < 0.8 * sum(each[options[0].index(alike)] for each in damages)


@pytest.mark.parametrize(
    ("options", "damages", "says"),
    [
        ([], [], "at least one"),
        ([[1, 2]], [], "one list of each"),
        ([[2, 1]], [[1.0, 0.0]], "family 0 has the options"),
        ([[1, 2], []], [[1.0, 0.0], []], "family 1 has the options"),
        ([[1, 2]], [[1.0]], "and 1 damages"),
        ([[1, 2]], [[math.nan, 0.0]], "NaN or infinite"),
    ],
)
def test_what_does_not_match_is_refused(options, damages, says):
    with pytest.raises(SettingError, match=says):
        allocate(options, damages, Cost([Term(1.0, (one(0),))]), 1.0)


def test_three_widths_need_a_function():
    with pytest.raises(SettingError, match="at most 2"):
        Term(1.0, (one(0), one(1), one(2)))
    with pytest.raises(SettingError, match="target=nan"):
        allocate([[1]], [[0.0]], Cost([]), math.nan)
