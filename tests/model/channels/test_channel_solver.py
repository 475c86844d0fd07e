"""Channel solver: random atoms, edges, freezes and tables, against a slow fixed point over sets."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.model.channels.atoms import DEAD, Atoms
from tersor.model.channels.solver import POLICY, classes, components, solve


class Slow:
    """The same rules, atom by atom."""

    def __init__(self, atoms: Atoms, exact: bool):
        self.atoms, self.every = atoms, range(DEAD, atoms.count)
        self.parent = {a: a for a in self.every}
        self.frozen: set[int] = set()  # atoms of components that are frozen, as their roots
        self.tables = [(t.cells, t.axes) for t in atoms.tables]
        for a, b in atoms.edges:
            for x, y in zip(a.tolist(), b.tolist(), strict=True):
                self.join(x, y)
        some = [array for array, _ in [*atoms.freezes, *(atoms.flags if exact else [])]]
        for array in some:
            self.freeze(*array.tolist())

    def root(self, a: int) -> int:
        while self.parent[a] != a:
            a = self.parent[a]
        return a

    def join(self, a: int, b: int) -> None:
        if min(a, b) >= DEAD:
            held = self.held(a) or self.held(b)
            self.parent[self.root(a)] = self.root(b)
            if held:
                self.freeze(b)

    def held(self, a: int) -> bool:
        return a < DEAD or self.root(a) in {self.root(f) for f in self.frozen}

    def freeze(self, *some: int) -> bool:
        new = {self.root(a) for a in some if not self.held(a)}
        self.frozen |= new
        return bool(new)

    def living(self, axes) -> list[int]:
        return [k for k, axis in enumerate(axes) if not all(self.held(a) for a in axis.tolist())]

    def settle(self) -> None:
        changed = True
        while changed:
            changed, rest = False, []
            for cells, axes in self.tables:
                for place in itertools.product(*(range(len(axis)) for axis in axes)):
                    if self.held(int(cells[place])):
                        changed |= self.freeze(*(int(axis[i]) for axis, i in zip(axes, place, strict=True)))
            for cells, axes in self.tables:
                living = self.living(axes)
                if not living:
                    changed |= self.freeze(*cells.ravel().tolist())
                elif len(living) == 1:
                    changed = True
                    for place in itertools.product(*(range(len(axis)) for axis in axes)):
                        at = int(axes[living[0]][place[living[0]]])
                        if self.held(at):
                            self.freeze(int(cells[place]))
                        elif not self.held(int(cells[place])):
                            self.join(int(cells[place]), at)
                        else:
                            self.freeze(at)
                else:
                    rest.append((cells, axes))
            self.tables = rest

    def alike(self) -> set[frozenset[int]]:
        """The components that are free."""
        found: dict[int, set[int]] = {}
        for a in self.every:
            if not self.held(a):
                found.setdefault(self.root(a), set()).add(a)
        return set(map(frozenset, found.values()))


@st.composite
def problems(draw, tables=3):
    """Up to `tables` tables of 2 or 3 axes, some axes shared, with random edges and freezes."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    atoms, arrays = Atoms(), []
    for number in range(draw(st.integers(0, tables))):
        atoms.here = f"op{number}"
        axes = []
        for _ in range(int(random.integers(2, 4))):
            fits = [array for array in arrays if 2 <= len(array) <= 4]
            share = fits and random.random() < 0.4
            axes.append(
                fits[random.integers(len(fits))] if share else atoms.fresh(int(random.integers(2, 4)))
            )
        shape = [len(axis) for axis in axes]
        cells = atoms.fresh(int(np.prod(shape)))
        if random.random() < 0.3:  # as after a merge with a dead axis
            cells = np.repeat(cells[: len(cells) // shape[-1]], shape[-1])
        atoms.table(cells, axes)
        arrays += [*axes, cells]
    arrays.append(atoms.fresh(5))
    alive = np.arange(DEAD, atoms.count)
    for _ in range(int(random.integers(0, 5))):
        count = int(random.integers(1, 3))
        atoms.tie(random.choice(alive, count), random.choice(alive, count))
    for _ in range(int(random.integers(0, 3))):
        atoms.freeze(random.choice(alive, 1), f"reason {random.integers(3)}")
    if random.random() < 0.4:
        atoms.flag(random.choice(alive, 2), "norm")
    return atoms


def free_of(atoms, now):
    found = {}
    for a in range(DEAD, atoms.count):
        if now.frozen[now.component[a]] < 0:
            found.setdefault(int(now.component[a]), set()).add(a)
    return set(map(frozenset, found.values()))


@settings(deadline=None, max_examples=100)
@given(problems(), st.booleans(), st.integers(0, 99))
def test_any_removal_of_free_units_is_consistent(atoms, exact, seed):
    """Whatever the choice of axes: edges have one fate, tables hold, nothing frozen goes."""
    now = solve(atoms, exact=exact)
    random = np.random.default_rng(seed)
    gone = (now.frozen < 0) & (random.random(len(now.frozen)) < 0.5)
    lost = gone[now.component]
    assert not lost[:DEAD].any()
    for a, b in atoms.edges:
        assert (lost[a] == lost[b]).all()
    for array, _ in [*atoms.freezes, *(atoms.flags if exact else [])]:
        assert not lost[array].any()
    for cells, axes, _ in atoms.tables:
        for place in itertools.product(*(range(len(axis)) for axis in axes)):
            assert lost[cells[place]] == any(lost[axis[i]] for axis, i in zip(axes, place, strict=True))


@settings(deadline=None, max_examples=100)
@given(problems(), st.booleans())
def test_before_any_choice_it_is_the_slow_fixed_point(atoms, exact):
    """Where no table is left to choose an axis of, the free components are equal."""
    slow = Slow(atoms, exact)
    slow.settle()
    now = solve(atoms, exact=exact)
    if not slow.tables:
        assert free_of(atoms, now) == slow.alike()
    else:  # a choice only freezes and ties more
        held = {a for a in slow.every if slow.held(a)}
        assert not held & set().union(*free_of(atoms, now), set())


@settings(deadline=None, max_examples=100)
@given(problems(tables=1), st.booleans())
def test_one_table_keeps_the_axis_with_more_cells(atoms, exact):
    """Against both choices, made by the slow one. In doubt the outer axis lives."""
    found = []
    for side in (0, -1):
        slow = Slow(atoms, exact)
        slow.settle()
        cells = slow.tables[0][0].ravel().tolist() if slow.tables else []
        while slow.tables:
            _, axes = slow.tables[0]
            keep = slow.living(axes)[side]
            held = {slow.root(a) for a in axes[keep].tolist()}
            for k in slow.living(axes):
                if k != keep:
                    slow.freeze(*axes[k].tolist())
            slow.settle()
            assert held
        free = {slow.root(a) for a in cells if not slow.held(a)}
        found.append((sum(not slow.held(a) for a in cells) if len(free) > 1 else 0, slow.alike()))
    (outer, first), (inner, second) = found
    assert free_of(atoms, solve(atoms, exact=exact)) == (second if inner > outer else first)


def test_the_first_reason_is_kept():
    atoms = Atoms()
    a = atoms.fresh(3)
    atoms.tie(a[:1], a[1:2])
    atoms.freeze(a[1:2], "first")
    atoms.freeze(a[:1], "second")
    now = solve(atoms, exact=True)
    assert [atoms.reasons[n] if n >= 0 else "" for n in now.of(a)] == ["first", "first", ""]


def test_flags_freeze_in_exact_mode_only():
    atoms = Atoms()
    a, b = atoms.fresh(3), atoms.fresh(3)
    atoms.tie(a, b)
    atoms.flag(b[:2], "layer_norm")
    assert (solve(atoms, exact=False).of(a) < 0).all()
    now = solve(atoms, exact=True)
    assert [atoms.reasons[n] if n >= 0 else "" for n in now.of(a)] == ["layer_norm counts it"] * 2 + [""]


def test_rigid_operators_and_more_freezes():
    atoms = Atoms()
    atoms.here = "view"
    whole, heads, width = atoms.fresh(12), atoms.fresh(3), atoms.fresh(4)
    atoms.table(whole, [heads, width])
    other = atoms.fresh(2)
    now = solve(atoms, exact=True, still=[(other[:1], "asked")])
    assert (now.of(heads) < 0).all()
    assert [atoms.reasons[n] for n in now.of(width)] == [POLICY] * 4
    assert (now.of(other) < 0).tolist() == [False, True]
    now = solve(atoms, exact=True, rigid=["view"])
    assert {atoms.reasons[n] for n in np.concatenate([now.of(a) for a in (whole, heads, width)])} == {
        "a width that the code fixes"
    }
    assert (now.of(other) < 0).all()


def test_a_split_and_a_merge_in_another_order_keep_the_same_axis():
    """As in a shuffle of channels: [3 4] -> [4 3]. The second table does not freeze what the first keeps."""
    atoms = Atoms()
    whole, outer, inner = atoms.fresh(12), atoms.fresh(3), atoms.fresh(4)
    atoms.table(whole, [outer, inner])
    turned = atoms.fresh(12)
    atoms.table(turned, [inner, outer])
    now = solve(atoms, exact=True)
    assert (now.of(whole) < 0).all()
    assert (now.of(turned) < 0).all()
    assert len(set(now.component[whole])) == 3
    assert (now.component[whole.reshape(3, 4)] == now.component[turned.reshape(4, 3).T]).all()


def test_an_axis_whose_units_only_go_together_is_not_chosen():
    atoms = Atoms()
    whole, outer, inner = atoms.fresh(12), atoms.fresh(3), atoms.fresh(4)
    atoms.table(whole, [outer, inner])
    atoms.tie(outer[:2], outer[1:])
    now = solve(atoms, exact=True)
    assert (now.of(inner) < 0).all()
    assert len(set(now.component[whole])) == 4


def test_classes_share_a_living_axis():
    atoms = Atoms()
    a, b, c, d = (atoms.fresh(2) for _ in range(4))
    for axes in ([a, b], [b, c], [d, atoms.fresh(2)]):
        atoms.table(atoms.fresh(4), axes)
    now = solve(Atoms(), exact=True)
    now = type(now)(np.arange(atoms.count), np.where(np.arange(atoms.count) < DEAD, 0, -1))
    assert sorted(classes(now, atoms.tables).values()) == [[0, 1], [2]]
    now.frozen[b] = 0
    assert sorted(classes(now, atoms.tables).values()) == [[0], [1], [2]]


def test_components_without_edges():
    assert components([], 3).tolist() == [0, 1, 2]
