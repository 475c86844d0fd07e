"""Roles: what each parameter and buffer of a model is for, from the graph of its forward.

matrix        a weight of a product          table      rows are looked up by input-dependent indices
convolution   a kernel                       recurrent  a weight of an LSTM, a GRU, an RNN
scale  bias  mask                            multiplied, added, used to select elements
position      added or concatenated with two axes or more, or rows looked up by constant indices: learned
              positions, class tokens, queries, relative position biases
unread        no output depends on it        unknown    no rule covers a use, or its uses disagree
A parameter is followed forward, through views and values computed from parameters only, to the operators that
use it (rules.py); all uses must agree. A matrix that is also a table is a table if the rows are the same.
Cost: milliseconds, less than the trace of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.model.axis_origins import Labels, blurred, of_shape, together
from tersor.model.graph import Graph, arguments, op_name, value, values
from tersor.model.parameter_use import Role, Use
from tersor.model.rules import RULES
from tersor.model.sites import LEFT, Site

KINDS = {"matrix": "linear", "table": "embedding", "recurrent": "recurrent", "convolution": "conv"}
SAME = {"attention": "linear"}  # kinds that mean the same here
Found = Labels | list[Labels]  # a list for an operator with several results


def roles(graph: Graph) -> dict[str, Role]:
    """The role of each parameter and buffer, by its first name."""
    starts: dict[str, list[fx.Node]] = {}
    for node, name in graph.tensors.items():
        starts.setdefault(name, []).append(node)
    order = {node: at for at, node in enumerate(graph.program.graph.nodes)}
    moving = set(graph.inputs) | (set(graph.nodes) - graph.constant)
    return {
        name: Role("unread", why="no output depends on it")
        if name in graph.unread
        else agreed(role for node in nodes for role in uses(node, order, moving))
        for name, nodes in starts.items()
    }


def agreed(found: Iterable[Role]) -> Role:
    """The role that all uses agree on, else "unknown"."""
    every = list(dict.fromkeys(found))
    if not every:
        return Role("unknown", why="no operator with a rule uses it")
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
    if words == {"table", "position"}:  # the same rows, looked up by data and by constant indices
        return replace(tables[0], why=why)
    return Role("unknown", why=f"its uses disagree: {why}")


def uses(start: fx.Node, order: dict[fx.Node, int], moving: set[fx.Node]) -> list[Role]:
    """The role by each use of a parameter, in the order of the graph."""
    tensor = value(start)
    shape = tuple(map(int, tensor.shape))
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
            roles.append(Role("unknown", why="it is an output itself"))
            continue
        new, after = step(node, found, moving, shape, tensor.dtype is torch.bool)
        roles += new
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
    """(the roles by one operator, the labels of its result if it passes the parameter on)."""
    name, given = op_name(node).rstrip("_"), arguments(node)
    if name == "getitem":
        above = found[node.args[0]]  # type: ignore[index]
        return [], above[node.args[1]] if isinstance(above, list) else above  # type: ignore[index]
    results = [item for item in values(node) if isinstance(item, Tensor)]
    if not results:
        return ([], None) if name.startswith(("sym_", "_assert")) else ([Role("unknown", why=name)], None)
    roles: list[Role] = []
    after: Found | None = None
    for slot, argument in slots(given):
        if argument not in found:
            continue
        labels = found[argument]
        if isinstance(labels, list):
            return [Role("unknown", why=name)], None
        shape = tuple(map(int, results[0].shape))
        use = Use(name, node, slot, labels, given, shape, node not in moving, parameter, boolean)
        rule = RULES.get(name)
        role = rule.decides(use) if rule is not None and rule.decides is not None else None
        if role is not None:
            roles.append(role)
            continue
        if rule is not None and rule.moves is not None:
            moved = rule.moves(use)
        elif not use.constant:
            roles.append(Role("mask" if boolean else "unknown", why=name))
            continue
        elif isinstance(value(node), (tuple, list)):
            moved = [blurred(labels, tuple(map(int, item.shape))) for item in results]
        else:
            moved = labels if shape == tuple(map(int, value(argument).shape)) else blurred(labels, shape)
        if isinstance(after, tuple) and isinstance(moved, tuple):
            after = together(after, moved, use.shape)
        else:
            after = moved
    return roles, after


def slots(given: Mapping[str, Any]) -> list[tuple[str, fx.Node]]:
    """(name, node) of each argument that is a node of the graph; item 3 of a list is named "params.3"."""
    found = []
    for name, argument in given.items():
        if isinstance(argument, fx.Node):
            found.append((name, argument))
        elif isinstance(argument, (list, tuple)):
            found += [(f"{name}.{at}", item) for at, item in enumerate(argument) if isinstance(item, fx.Node)]
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
