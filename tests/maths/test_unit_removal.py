"""Unit removal against a slow loop that solves the least squares anew after each removal."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.maths import unit_removal
from tersor.maths.damping import DAMP
from tersor.maths.unit_removal import Reader, removal


def damped(h):
    h = h.double()
    return h + (DAMP * float(h.diagonal().mean()) + 1e-12) * torch.eye(len(h), dtype=torch.float64)


def best(w, h, gone):
    """The weight without some columns that is nearest to w, and its squared distance, in the metric h."""
    kept = [k for k in range(len(h)) if k not in gone]
    new = torch.zeros_like(w)
    if kept:
        new[:, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w.T).T
    d = w - new
    return new, float(((d @ h) * d).sum())


def slow(readers, units, least):
    """The greedy order, and the damage, each from the first weights by a least squares of its own."""
    parts = [(reader.weight.double(), damped(reader.moment), reader.columns.tolist()) for reader in readers]
    order, damage = [], [0.0]

    def total(some):
        return sum(best(w, h, {k for u in some for k in columns[u]})[1] for w, h, columns in parts)

    while len(order) < units - least:
        left = [u for u in range(units) if u not in order]
        costs = [total([*order, u]) for u in left]
        at = min(range(len(left)), key=lambda k: costs[k])
        order.append(left[at])
        damage.append(costs[at])
    last, start = total(order), list(order)
    rest = {u: total([*start, u]) - last for u in range(units) if u not in order}
    for u in sorted(rest, key=lambda u: rest[u]):
        order.append(u)
        damage.append(damage[-1] + rest[u])
    return order, damage


def problem(seed, units, sizes, rows):
    """Readers of the same units, whose inputs are correlated: a unit has `sizes` columns in each reader, and
    they are not side by side."""
    g = torch.Generator().manual_seed(seed)
    readers = []
    for size, outputs in zip(sizes, rows, strict=True):
        width = units * size
        mix = torch.randn(width, width, generator=g, dtype=torch.float64)
        x = torch.randn(3 * width, width, generator=g, dtype=torch.float64) @ mix
        columns = torch.randperm(width, generator=g).reshape(units, size)
        readers.append(Reader(torch.randn(outputs, width, generator=g), x.T @ x / len(x), columns))
    return readers


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32), st.integers(2, 7), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data()
)
def test_order_and_damage_are_those_of_a_least_squares_for_each(seed, units, sizes, data):
    readers = problem(seed, units, sizes, [data.draw(st.integers(1, 4)) for _ in sizes])
    least = data.draw(st.integers(1, units))
    with mock.patch.object(unit_removal, "LATER", data.draw(st.sampled_from([1, 2, 3, 16]))):
        found = removal(readers, units, least)
    order, damage = slow(readers, units, least)
    assert found.order.tolist() == order
    assert found.damage.tolist() == pytest.approx(damage, rel=1e-7, abs=1e-9 * damage[-1])


def test_the_damage_of_all_is_the_energy_of_the_outputs():
    """One reader, one unit left at last: the rest is removed too, and nothing of W H W^T is left."""
    (reader,) = problem(3, 5, [2], [3])
    found = removal([reader], 5)
    w = reader.weight.double()
    assert float(found.damage[-1]) == pytest.approx(float(((w @ damped(reader.moment)) * w).sum()))
    assert (found.damage.diff() > 0).all()
    assert sorted(found.order.tolist()) == list(range(5))


def test_what_others_can_rebuild_goes_first():
    """A large unit that is the sum of two others, and a small one that nothing can replace."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=g)
    x[:, 1] = 3 * (x[:, 0] + x[:, 2])
    x[:, 3] *= 0.5
    reader = Reader(torch.tensor([[1.0, 2.0, -1.0, 1.0]]), x.T @ x / len(x), torch.arange(4)[:, None])
    found = removal([reader], 4)
    assert int(found.order[0]) in (0, 1, 2)
    assert float(found.damage[1]) < 0.05 * float(found.damage[2])


def test_a_unit_that_nobody_reads_is_free():
    (reader,) = problem(1, 4, [2], [3])
    reader.weight[:, reader.columns[2]] = 0
    independent = Reader(reader.weight, torch.eye(8), reader.columns)
    found = removal([independent], 4)
    assert int(found.order[0]) == 2
    assert float(found.damage[1]) == 0


def test_readers_add_up():
    """Two copies of a reader: the same order, twice the damage."""
    (reader,) = problem(5, 6, [1], [4])
    one, two = removal([reader], 6), removal([reader, reader], 6)
    assert one.order.tolist() == two.order.tolist()
    assert two.damage.tolist() == pytest.approx([2 * d for d in one.damage.tolist()])


def test_given_tensors_stay():
    readers = problem(7, 4, [2, 1], [3, 2])
    before = [[t.clone() for t in reader[:3]] for reader in readers]
    removal(readers, 4)
    assert all(
        torch.equal(a, b)
        for old, new in zip(before, readers, strict=True)
        for a, b in zip(old, new[:3], strict=True)
    )
