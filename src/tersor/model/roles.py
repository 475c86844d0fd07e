"""Roles: what each parameter and buffer of a model is for, from the graph of its forward.

matrix        a weight of a product          table      rows that the data choose
convolution   a kernel                       recurrent  a weight of an LSTM, a GRU, an RNN
scale  bias  mask                            what one multiplies with, adds, hides with
position      added or put beside along two axes or more, or rows that places choose: learned positions, class
              tokens, queries, relative position biases
unread        no answer depends on it        unknown    nobody understood, or its uses disagree
A parameter is followed forward, through views and whatever is computed of parameters alone, to the operators
that use it (rules.py); all of them must agree. A matrix that is a table too is a table: the same rows.
Cost: milliseconds; the graph took longer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.model.graph import Graph, arguments, op_name, value, values
from tersor.model.labels import Labels, blurred, of_shape, together
from tersor.model.parameter_use import Role, Use
from tersor.model.rules import RULES
from tersor.model.sites import LEFT, Site

KINDS = {"matrix": "linear", "table": "embedding", "recurrent": "recurrent", "convolution": "conv"}
SAME = {"attention": "linear"}  # kinds of layers that are another word for the same
Found = Labels | list[Labels]  # a list of an operator that makes several values


def roles(graph: Graph) -> dict[str, Role]:
    """The role of each parameter and buffer, by the first of its names."""
    starts: dict[str, list[fx.Node]] = {}
    for node, name in graph.tensors.items():
        starts.setdefault(name, []).append(node)
    order = {node: at for at, node in enumerate(graph.program.graph.nodes)}
    moving = set(graph.inputs) | (set(graph.nodes) - graph.constant)
    return {
        name: Role("unread", why="no answer depends on it")
        if name in graph.unread
        else agreed(role for node in nodes for role in uses(node, order, moving))
        for name, nodes in starts.items()
    }


def agreed(found: Iterable[Role]) -> Role:
    """One role of all uses."""
    every = list(dict.fromkeys(found))
    if not every:
        return Role("unknown", why="nothing that has a rule uses it")
    kinds = {(role.word, role.axis, role.contracted, role.groups) for role in every}
    why = ", ".join(dict.fromkeys(role.why for role in every))
    words = {role.word for role in every}
    if len(kinds) == 1:
        return replace(every[0], why=why)
    tables = [role for role in every if role.word == "table"]
    if words == {"table", "matrix"} and len({role.axis for role in every}) == 1:
        return replace(tables[0], why=why)
    if words == {"bias", "position"}:
        return Role("position", why=why)
    if words == {"table", "position"}:  # the same rows, by data here and by place there
        return replace(tables[0], why=why)
    return Role("unknown", why=f"its uses disagree: {why}")


def uses(start: fx.Node, order: dict[fx.Node, int], moving: set[fx.Node]) -> list[Role]:
    """The role that each use of a parameter says, in the order of the graph."""
    made = value(start)
    shape = tuple(map(int, made.shape))
    found: dict[fx.Node, Found] = {start: of_shape(shape)}
    roles: list[Role] = []
    queue = [(order[user], user) for user in start.users]
    heapq.heapify(queue)
    seen: set[fx.Node] = set()
    while queue:
        _, node = heapq.heappop(queue)
        if node in seen:
            continue
        seen.add(node)
        if node.op != "call_function":
            roles.append(Role("unknown", why="it is an answer itself"))
            continue
        said, after = step(node, found, moving, shape, made.dtype is torch.bool)
        roles += said
        if after is not None:
            found[node] = after
            for user in node.users:
                heapq.heappush(queue, (order[user], user))
    return roles


def step(
    node: fx.Node,
    found: dict[fx.Node, Found],
    moving: set[fx.Node],
    parameter: tuple[int, ...],
    boolean: bool,
) -> tuple[list[Role], Found | None]:
    """(what one operator says, what it hands on)."""
    name, given = op_name(node).rstrip("_"), arguments(node)
    if name == "getitem":
        above = found[node.args[0]]  # type: ignore[index]
        return [], above[node.args[1]] if isinstance(above, list) else above  # type: ignore[index]
    made = [one for one in values(node) if isinstance(one, Tensor)]
    if not made:
        return ([], None) if name.startswith(("sym_", "_assert")) else ([Role("unknown", why=name)], None)
    said: list[Role] = []
    after: Found | None = None
    for slot, one in slots(given):
        if one not in found:
            continue
        labels = found[one]
        if isinstance(labels, list):
            return [Role("unknown", why=name)], None
        shape = tuple(map(int, made[0].shape))
        use = Use(name, node, slot, labels, given, shape, node not in moving, parameter, boolean)
        rule = RULES.get(name)
        role = rule.decides(use) if rule is not None and rule.decides is not None else None
        if role is not None:
            said.append(role)
            continue
        if rule is not None and rule.moves is not None:
            moved = rule.moves(use)
        elif not use.constant:
            said.append(Role("mask" if boolean else "unknown", why=name))
            continue
        elif isinstance(value(node), (tuple, list)):
            moved = [blurred(labels, tuple(map(int, one.shape))) for one in made]
        else:
            moved = labels if shape == tuple(map(int, value(one).shape)) else blurred(labels, shape)
        if isinstance(after, tuple) and isinstance(moved, tuple):
            after = together(after, moved, use.shape)
        else:
            after = moved
    return said, after


def slots(given: Mapping[str, Any]) -> list[tuple[str, fx.Node]]:
    """(name, operator) of each argument that is a value; "params.3" in a list."""
    found = []
    for name, one in given.items():
        if isinstance(one, fx.Node):
            found.append((name, one))
        elif isinstance(one, (list, tuple)):
            found += [(f"{name}.{at}", item) for at, item in enumerate(one) if isinstance(item, fx.Node)]
    return found


def with_role(site: Site, role: Role) -> Site:
    """The site with the kind of its role instead of that of its layer's class. Unchanged if the role is
    unread or unknown, for vectors (which have one axis only) and for buffers."""
    if site.kind == "buffer" or len(site.shape) < 2 or role.word in ("unknown", "unread"):
        return site
    if role.word in LEFT:
        return replace(site, kind=role.word, axis=0, groups=1)
    kind = KINDS[role.word]
    if kind == "conv" and role.axis == 1:
        kind = "convtranspose"
    kind = site.kind if SAME.get(site.kind, site.kind) == kind else kind
    new = replace(site, kind=kind, axis=role.axis, groups=role.groups)
    return new if new.contracted == role.contracted else site
