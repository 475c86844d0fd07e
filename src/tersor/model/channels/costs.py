"""Costs: what the units of a model cost, as a sum of products of widths, for an exact allocation.

macs         conv: positions * kernel * inputs / groups * outputs      linear, matmul: rows * inner * columns
parameters   the product of a tensor's sizes
bytes        the same, times the stored bytes of one element now
A width is affine in the numbers of kept units: what is frozen, plus the indices of each unit of each family.
Attention's products count as well. Elementwise operators and norms are left out, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import fx

from tersor.maths.allocation import Cost, Term, Width
from tersor.model.channels.atoms import Array, Label
from tersor.model.channels.groups import Family, Groups, own_parameter, removal
from tersor.model.channels.walk import Walk
from tersor.model.graph import arguments, first, op_name, value

PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv")


class Widths:
    """Widths of labels, affine in the numbers of kept units of these families."""

    def __init__(self, groups: Groups, families: Sequence[Family]):
        self.groups = groups
        self.family = np.full(len(groups.solution.frozen), -1)  # of each component
        self.sizes = [family.size for family in families]
        for k, family in enumerate(families):
            self.family[family.units] = k

    def of(self, atoms: Array) -> Width:
        owner = self.family[self.groups.solution.component[atoms]]
        numbers, counts = np.unique(owner[owner >= 0], return_counts=True)
        units = tuple((int(k), int(n) / self.sizes[k]) for k, n in zip(numbers, counts, strict=True))
        return Width(float((owner < 0).sum()), units)

    def term(self, constant: float, axes: Sequence[Array]) -> Term:
        """The product of these axes' widths; axes that no family touches go into the constant."""
        found = []
        for atoms in axes:
            width = self.of(atoms)
            if width.units:
                found.append(width)
            else:
                constant *= width.fixed
        return Term(constant, tuple(found), product if len(found) > 2 else None)


def product(*widths: float) -> float:
    return math.prod(widths)


def macs(groups: Groups, families: Sequence[Family]) -> Cost:
    """Multiply-accumulates of one forward of the traced example."""
    widths = Widths(groups, families)
    return Cost([term for node in groups.nodes() for term in mac_terms(groups, widths, node)])


def macs_of(walk: Walk) -> dict[fx.Node, float]:
    """Multiply-accumulates of each operator for the traced example, nothing cut."""
    groups = removal(walk, {})[0]
    widths = Widths(groups, ())
    terms = {node: list(mac_terms(groups, widths, node)) for node in groups.nodes()}
    return {node: sum(term.constant for term in found) for node, found in terms.items() if found}


def mac_terms(groups: Groups, widths: Widths, node: fx.Node) -> Iterator[Term]:
    """Multiply-accumulates of one operator."""
    labels = groups.walk.labels
    name, given = op_name(node), arguments(node)
    if "conv" in name:
        weight: Label = labels[given["weight"]]
        space = math.prod(tuple(value(node).shape)[-(len(weight) - 2) :])
        if "transpose" in name:  # each input position meets the kernel
            space = math.prod(tuple(value(first(node)).shape)[-(len(weight) - 2) :])
        batch = math.prod(tuple(value(node).shape)[: -(len(weight) - 1)])
        kernel = math.prod(len(atoms) for atoms in weight[2:])
        yield widths.term(batch * space * kernel, weight[:2])
    elif name == "linear":
        weight = labels[given["weight"]]
        rows = [atoms for atoms in labels[first(node)][:-1] if len(atoms) > 1]
        yield widths.term(1.0, [*rows, *weight])
    elif name in PRODUCTS:
        nodes = [item for item in given.values() if isinstance(item, fx.Node)][-2:]
        left, right = (labels[item] for item in nodes)
        result = labels[node] or []
        if left and right:
            yield widths.term(1.0, [*result, left[-1]])
    elif name == "einsum" and len(given["tensors"]) == 2:
        words = str(given["equation"]).replace(" ", "").partition("->")[0].split(",")
        letters: dict[str, Array] = {}
        for item, word in zip(given["tensors"], words, strict=True):
            for letter, atoms in zip(word, labels[item], strict=False):
                if len(letters.get(letter, ())) <= 1:  # a size of 1 is broadcast
                    letters[letter] = atoms
        yield widths.term(1.0, list(letters.values()))
    elif name == "scaled_dot_product_attention":
        query, key, seen = (labels[given[word]] for word in ("query", "key", "value"))
        yield widths.term(1.0, [*query, key[-2]])
        yield widths.term(1.0, [*query[:-1], key[-2], seen[-1]])
    elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        steps = math.prod(tuple(value(first(node)).shape)[:-1])
        for item in given["params"]:
            if len(labels[item]) == 2:
                yield widths.term(steps, labels[item])


def parameters(groups: Groups, families: Sequence[Family], each: Mapping[str, float] | None = None) -> Cost:
    """Elements of all parameters, or `each` times the elements of these tensors."""
    widths = Widths(groups, families)
    own = groups.walk.tensors
    learned = set(groups.graph.program.graph_signature.parameters)
    price = {name: 1.0 for name in own if own_parameter(name, learned)} if each is None else each
    return Cost([widths.term(price[name], label) for name, label in own.items() if name in price])


def units(families: Sequence[Family]) -> Cost:
    return Cost([Term(1.0, (Width(0.0, ((k, 1.0),)),)) for k in range(len(families))])
