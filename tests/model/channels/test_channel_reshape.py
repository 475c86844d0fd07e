"""Channel reshape: labels through merging and splitting, against elements that numpy moves."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.model.channels.atoms import DEAD, Atoms, alive
from tersor.model.channels.reshape import reshaped, segments
from tersor.model.channels.solver import POLICY, solve


def factors(n: int) -> list[int]:
    found, k = [], 2
    while n > 1:
        while n % k == 0:
            found.append(k)
            n //= k
        k += 1
    return found


@st.composite
def shapes(draw, count=2):
    """Several shapes with one product, sizes of 1 among them."""
    product = draw(st.sampled_from([1, 2, 6, 8, 12, 16, 24, 36, 48, 60]))
    found = []
    for _ in range(count):
        primes = draw(st.permutations(factors(product)))
        places = draw(st.integers(1, 5))
        sizes = [1] * places
        for prime in primes:
            sizes[draw(st.integers(0, places - 1))] *= prime
        found.append(tuple(sizes))
    return found


def labelled(atoms, shape, living):
    return [
        atoms.fresh(n) if lives else atoms.dead("space", n) for n, lives in zip(shape, living, strict=True)
    ]


@settings(deadline=None, max_examples=120)
@given(shapes(count=3), st.data())
def test_what_is_removed_is_the_same_elements_before_and_after(some, data):
    """Elements are numbered. After two reshapes and any removal of units that are free, the elements that
    are left have the same order as those that numpy's reshape gives."""
    atoms = Atoms()
    living = data.draw(st.lists(st.booleans(), min_size=len(some[0]), max_size=len(some[0])))
    labels = [labelled(atoms, some[0], living)]
    for shape in some[1:]:
        labels.append(reshaped(atoms, labels[-1], shape))
        assert tuple(len(array) for array in labels[-1]) == shape
    now = solve(atoms, exact=True)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    free = np.flatnonzero(now.frozen < 0)
    gone = np.zeros(len(now.frozen), bool)
    gone[random.permutation(free)[: len(free) // 2]] = True
    elements = np.arange(math.prod(some[0]))
    left = None
    for shape, label in zip(some, labels, strict=True):
        keeps = [np.flatnonzero(~gone[now.component[array]]) for array in label]
        here = elements.reshape(shape)[np.ix_(*keeps)].ravel().tolist()
        assert left is None or here == left
        left = here


@settings(deadline=None, max_examples=100)
@given(shapes(), st.data())
def test_a_dimension_that_is_flattened_and_restored_lives(some, data):
    """Only one dimension lives: flat and back it has all its units, and the other dimensions none. Through
    other shapes some may tie, but the frozen ones are exactly those that no choice of axes leaves apart."""
    shape, other = some
    long = [d for d, n in enumerate(shape) if n > 1]
    if not long:
        return
    at = data.draw(st.sampled_from(long))
    atoms = Atoms()
    label = labelled(atoms, shape, [d == at for d in range(len(shape))])
    flat = reshaped(atoms, label, [math.prod(shape)])
    back = reshaped(atoms, flat, shape)
    now = solve(atoms, exact=True)
    assert (now.of(label[at]) < 0).all()
    assert (now.component[back[at]] == now.component[label[at]]).all()
    assert len(set(now.component[label[at]])) == shape[at]
    assert not any(alive(array) for d, array in enumerate(back) if d != at)
    again = reshaped(atoms, label, shape)
    assert all(a is b or len(a) == 1 for a, b in zip(again, label, strict=True))
    via = reshaped(atoms, reshaped(atoms, label, other), shape)
    assert tuple(map(len, via)) == shape


@settings(deadline=None, max_examples=100)
@given(shapes())
def test_segments_are_the_smallest_with_equal_products(some):
    before, after = some
    pieces = list(segments(before, after))
    assert [k for sources, _ in pieces for k in sources] == list(range(len(before)))
    assert [n for _, sizes in pieces for n in sizes] == list(after)
    for sources, sizes in pieces:
        left = [before[k] for k in sources]
        assert math.prod(left) == math.prod(sizes)
        if not left or not sizes:  # the ones at the end of the longer shape
            assert {*left, *sizes} == {1}
            continue
        inner = {math.prod(left[:k]) for k in range(1, len(left))}
        assert not inner & {math.prod(sizes[:k]) for k in range(1, len(sizes))}


KEPT = [
    # before, which live, after, units of each dimension after, where 0 is frozen
    ("flatten of C H W", (2, 3, 4, 4), "-c--", (2, 48), (0, 3)),
    ("heads", (2, 5, 12), "--c", (2, 5, 3, 4), (0, 0, 3, 0)),
    ("fused qkv", (2, 5, 24), "--c", (2, 5, 3, 4, 2), (0, 0, 3, 0, 0)),
    ("groups of one", (2, 6, 4), "-c-", (2, 6, 1, 4), (0, 6, 0, 0)),
    ("windows", (2, 6, 6, 5), "---c", (2, 2, 3, 2, 3, 5), (0, 0, 0, 0, 0, 5)),
    ("tokens of a map", (2, 7, 3, 3), "-c--", (2, 7, 9), (0, 7, 0)),
    ("a batch of heads", (2, 4, 5, 3), "-h--", (8, 5, 3), (4, 0, 0)),
    ("heads that merge", (2, 5, 4, 3), "--hd", (2, 5, 12), (0, 0, 4)),
    ("nothing lives", (2, 12), "--", (2, 3, 4), (0, 0, 0)),
]


@pytest.mark.parametrize(
    ("before", "living", "after", "units"), [row[1:] for row in KEPT], ids=[row[0] for row in KEPT]
)
def test_known_reshapes(before, living, after, units):
    atoms = Atoms()
    label = labelled(atoms, before, [letter != "-" for letter in living])
    found = reshaped(atoms, label, after)
    now = solve(atoms, exact=True)
    free = [{int(now.component[a]) for a in array if now.frozen[now.component[a]] < 0} for array in found]
    assert tuple(map(len, free)) == units


def test_a_frozen_cell_freezes_its_slice_on_both_axes():
    """Then two rows of 4 or three columns of 3 may go: the columns are more."""
    atoms = Atoms()
    whole = atoms.fresh(12)
    rows, columns = reshaped(atoms, [whole], [3, 4])
    atoms.freeze(whole[[5]], "seen")  # row 1, column 1
    now = solve(atoms, exact=True)
    assert [atoms.reasons[n] for n in now.of(rows)] == [POLICY, "seen", POLICY]
    assert (now.of(columns) < 0).tolist() == [True, False, True, True]
    assert (now.of(whole).reshape(3, 4) < 0).tolist() == [[True, False, True, True]] * 3


def test_an_empty_tensor_is_never_cut():
    atoms = Atoms()
    assert [a.tolist() for a in reshaped(atoms, [atoms.fresh(0), atoms.fresh(5)], [5, 0])] == [[0] * 5, []]
    assert atoms.reasons[0] == "empty"
    assert atoms.count == DEAD + 5
