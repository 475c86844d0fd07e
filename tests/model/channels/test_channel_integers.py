"""Channel integers: integers that remember their formulas, and what attributes must be after a cut."""

import operator
from typing import Any

import pytest
import torch
from channel_toys import prepared, randomized, some_units
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.model.changes import Set
from tersor.model.channels.groups import groups_of, walked
from tersor.model.channels.integers import (
    OPERATIONS,
    Traced,
    evaluated,
    fits,
    names_in,
    settings_of,
    solved,
    uses_of,
)
from tersor.model.channels.run_graph import GraphRun

A, B, C = ("m", "a"), ("m", "b"), ("m", "c")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_arithmetic_is_that_of_integers(data):
    """Random programs, with ordinary integers on either side; the formula gives other values as well."""
    numbers = {name: data.draw(st.integers(1, 40)) for name in (A, B, C)}
    stack: list[tuple[Any, int, Any]] = [
        (Traced(n, name), n, lambda v, name=name: v[name]) for name, n in numbers.items()
    ]
    for _ in range(data.draw(st.integers(1, 6))):
        x, plain_x, of_x = stack[data.draw(st.integers(0, len(stack) - 1))]
        y, plain_y, of_y = data.draw(
            st.sampled_from([*stack, *((k, k, lambda v, k=k: k) for k in (1, 2, 3, 7))])
        )
        name = data.draw(st.sampled_from(sorted(OPERATIONS)))
        swapped = data.draw(st.booleans())
        run = OPERATIONS[name]
        if swapped:
            x, plain_x, of_x, y, plain_y, of_y = y, plain_y, of_y, x, plain_x, of_x
        if name in ("floordiv", "mod") and plain_y == 0:
            continue
        found = run(x, y)
        assert isinstance(found, Traced)
        assert found == run(plain_x, plain_y)
        stack.append((found, run(plain_x, plain_y), lambda v, run=run, a=of_x, b=of_y: run(a(v), b(v))))
    other = {name: data.draw(st.integers(1, 40)) for name in (A, B, C)}
    for found, plain, of in stack:
        assert evaluated(found.formula, numbers) == plain == found
        try:
            wanted = of(other)
        except ZeroDivisionError:
            assert not fits(found.formula, other, 0)
        else:
            assert evaluated(found.formula, other) == wanted
            assert fits(found.formula, other, wanted)
            assert not fits(found.formula, other, wanted + 1)


def test_other_arithmetic_forgets():
    """A scale is a float; a comparison is a bool; a range and an index work."""
    n = Traced(4, A)
    assert type(n**-0.5) is float
    assert type(n / 2) is float
    assert type(n * 0.5) is float
    assert type(-n) is int
    assert (n > 3) is True
    assert list(range(n)) == [0, 1, 2, 3]
    assert [7, 8, 9, 10, 11][n] == 11
    assert torch.zeros(n).shape == (4,)
    assert list(names_in((n * 3 + 2).formula)) == [A]
    assert operator.index(n) == 4


def formula(run):
    return run(*(Traced(n, name) for n, name in zip((12, 4, 3), (A, B, C), strict=True))).formula


BEFORE = {A: 12, B: 4, C: 3}
# formulas with their values after the cut, and the attributes that change
SOLVED = [
    ("an attribute itself", [(lambda a, b, c: a, 7)], {A: 7}),
    ("a product", [(lambda a, b, c: b, 2), (lambda a, b, c: b * c, 6)], {B: 2}),
    ("a product with one unknown", [(lambda a, b, c: c, 3), (lambda a, b, c: b * c, 6)], {B: 2}),
    ("a quotient", [(lambda a, b, c: b, 2), (lambda a, b, c: a // b, 3)], {B: 2, A: 7}),
    ("a quotient, in the other order", [(lambda a, b, c: a // b, 3), (lambda a, b, c: b, 2)], {B: 2, A: 7}),
    ("one unknown before two", [(lambda a, b, c: a // b, 3), (lambda a, b, c: 2 * b, 4)], {B: 2, A: 7}),
    ("a sum and a remainder", [(lambda a, b, c: a + 2 * b, 16), (lambda a, b, c: b, 3)], {B: 3, A: 10}),
    ("two unknowns, one is as before", [(lambda a, b, c: a // b, 2)], {A: 11}),
    ("three times", [(lambda a, b, c: 3 * a, 21)], {A: 7}),
    ("uses that disagree", [(lambda a, b, c: b, 2), (lambda a, b, c: b, 3), (lambda a, b, c: a, 5)], {A: 5}),
    ("a formula of one that disagrees",
     [(lambda a, b, c: b, 2), (lambda a, b, c: b, 3), (lambda a, b, c: b * c, 6)], {}),
    ("no value fits", [(lambda a, b, c: 2 * a, 7)], {}),
    ("nothing is wanted", [], {}),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "values"), [row[1:] for row in SOLVED], ids=[row[0] for row in SOLVED])
def test_solved(wanted, values):
    wanted = [(formula(run), after) for run, after in wanted]
    found = solved(wanted, BEFORE)
    assert {name: n for name, n in found.items() if n != BEFORE[name]} == values


class Attention(nn.Module):
    """Literals from two attributes, one of them only in a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 6, 24
        self.q, self.k, self.v, self.out = (
            nn.Linear(5, 24),
            nn.Linear(5, 24),
            nn.Linear(5, 24),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            y(x).view(b, n, self.heads, self.width // self.heads).transpose(1, 2)
            for y in (self.q, self.k, self.v)
        )
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(b, n, self.width))


class Pieces(nn.Module):
    """A split by a tuple, a slice by an attribute, a split by one size, an expand, and an attribute that no
    operator reads."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.first, self.half, self.unused, self.shape = (3, 5), 4, 5, 8, [10, 1]
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 9), nn.Linear(6, 10)
        self.d, self.e, self.f, self.g = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(9, 4), nn.Linear(5, 4)
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x).relu().split(self.parts, -1)
        y = self.b(x).relu()
        y = torch.cat([y[:, self.first :], y[:, : self.first]], -1)
        left, right = self.c(x).split(self.half, -1)
        return self.d(one) * self.e(two) + self.f(y) + self.g(left * right.tanh())


def after(model: nn.Module, inputs: Any, chosen: Any) -> tuple[Any, dict[str, int]]:
    """(the groups, the attributes to set) after a cut."""
    model = randomized(prepared(model))
    groups = groups_of(walked(model, inputs, set(model.state_dict())))
    gone = chosen(groups)
    uses = uses_of(prepared(model), lambda net: net(*inputs))
    sets = settings_of(GraphRun(groups, gone, cut=True), uses)
    assert all(isinstance(one, Set) and one.module == "" for one in sets)
    return groups, {one.attribute: one.value for one in sets}


@pytest.mark.parametrize("heads", [2, 3, 5])
def test_heads_and_a_quotient(heads):
    def chosen(groups):
        (family,) = groups.families
        assert family.size == 6
        return groups.removed([family.units[heads:]])

    _, found = after(Attention(), (torch.randn(2, 7, 5),), chosen)
    assert found == {"heads": heads, "width": 4 * heads}


def test_splits_and_slices():
    def chosen(groups):
        assert {f.name: f.size for f in groups.families} == {
            "a.weight:0": 3, "a.weight:0/2": 5, "b.weight:0": 9, "c.weight:0": 5
        }  # fmt: skip
        three, five, nine, pairs = groups.families
        places = {int(k): unit for unit, (k,) in zip(nine.units, nine.slices[0].at.tolist(), strict=True)}
        first = [places[k] for k in (1, 3, 7)]  # two before the bound
        return groups.removed([three.units[:1], five.units[:2], first, pairs.units[1:3]])

    _, found = after(Pieces(), (torch.randn(2, 6),), chosen)
    assert found == {"parts.0": 2, "parts.1": 3, "first": 2, "half": 3}


def test_nothing_is_set_where_nothing_is_cut():
    for model, inputs in ((Attention(), torch.randn(2, 7, 5)), (Pieces(), torch.randn(2, 6))):
        assert after(model, (inputs,), lambda groups: groups.removed([]))[1] == {}


def test_settings_make_the_code_run_as_the_graph_does():
    """With the attributes set and the tensors cut by hand."""
    for make, inputs in ((Attention, torch.randn(2, 7, 5)), (Pieces, torch.randn(2, 6))):
        torch.manual_seed(0)
        model = randomized(prepared(make()))
        tensors = dict(model.named_parameters())
        groups = groups_of(walked(model, (inputs,), set(tensors)))
        for seed in range(3):
            gone = some_units(groups, seed)
            run = GraphRun(groups, gone, cut=True)
            sets = settings_of(run, uses_of(prepared(model), lambda net, x=inputs: net(x)))
            twin = prepared(model)
            for (name, axis), kept in groups.cuts(gone).items():
                path, _, leaf = name.rpartition(".")
                layer = twin.get_submodule(path)
                cut = getattr(layer, leaf).detach().index_select(axis, torch.from_numpy(kept))
                setattr(layer, leaf, nn.Parameter(cut))
            for one in sets:
                name, _, at = one.attribute.partition(".")
                if at:
                    parts = list(getattr(twin, name))
                    parts[int(at)] = one.value
                    setattr(twin, name, tuple(parts))
                else:
                    setattr(twin, name, one.value)
            with torch.no_grad():
                assert torch.allclose(twin(inputs), run.outputs(tensors, [inputs])[0], atol=1e-5)


def test_the_model_that_is_looked_at_keeps_its_class_and_stock_layers_their_integers():
    uses = uses_of(prepared(Pieces()), lambda net: net(torch.randn(2, 6)))
    assert {key for _, key in uses.values} == {
        "parts.0",
        "parts.1",
        "first",
        "half",
        "unused",
        "shape.0",
        "shape.1",
    }
    read = {key for use in uses.found for _, key in names_in(use.formula)}
    assert read == {"parts.0", "parts.1", "first", "half"}
