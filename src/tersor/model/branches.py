"""Branches: the residual branches of a model, from the graph of its forward.

y = x + f(x)        f: all that only this addition reads; it has weights, and its input is computed from x
x                   the other term: the stream, or a sum that it is in (x + attention(n) + mlp(n))
Setting f to zero leaves y = x. A term that is no such branch, though it has weights, has a reason: a shortcut
with layers of its own, a weight that is read elsewhere too. Cost: none beyond the trace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import fx, nn

from tersor.model.graph import Graph, first, op_name, placeholders, value, values, viewed_of, written

ADDS = ("add", "add_", "__iadd__")
PASSES = ("add", "add_", "sub", "mul", "div", "dropout", "clone", "contiguous", "view", "reshape", "permute",
          "transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "roll", "slice", "to", "alias",
          "detach")  # fmt: skip
MATRIX = 2  # axes from which on a parameter is a weight


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch."""

    name: str  # of the addition, as an edge: "layer1.0/add:0"
    adds: fx.Node  # x + f(x)
    stream: fx.Node  # x
    end: fx.Node  # f(x)
    edge: str  # the edge that is f(x), perhaps before views of it; see watch.py
    nodes: frozenset[fx.Node]  # the operators of f
    tensors: tuple[str, ...]  # parameters and buffers that only f reads, by first name


def branches(
    graph: Graph, model: nn.Module, tied: Collection[str] = ()
) -> tuple[list[Branch], dict[str, str]]:
    """(the branches in the order of the graph, additions that cannot lose their term -> why). `tied`: first
    names of tensors with several names."""
    return Finder(graph, model, tied).found()


class Finder:
    """What is known of a graph while its additions are looked at."""

    def __init__(self, graph: Graph, model: nn.Module, tied: Collection[str]):
        self.graph, self.tied = graph, set(tied)
        self.place = {node: at for at, node in enumerate(graph.program.graph.nodes)}
        self.parameters = dict(model.named_parameters())
        self.given = set(placeholders(graph.program.graph))

    def found(self) -> tuple[list[Branch], dict[str, str]]:
        branches, left = list[Branch](), dict[str, str]()
        for node in self.graph.nodes:
            if op_name(node) not in ADDS or node not in self.graph.live:
                continue
            terms = [term for term in node.args[:2] if isinstance(term, fx.Node)]
            if len(terms) < 2 or terms[0] is terms[1]:
                continue
            mine, why = list[Branch](), ""
            for end, stream in (terms, terms[::-1]):
                branch = self.branch(node, end, stream)
                if isinstance(branch, Branch):
                    mine.append(branch)
                why = branch if isinstance(branch, str) and branch else why
            if mine:  # of two, x + f(x) with x = g(f) cannot be: one is computed from the other
                branches += mine[:1]
            elif why:
                left[self.named(node)] = why
        return branches, left

    def named(self, node: fx.Node) -> str:
        return self.graph.made.get((node, None)) or f"{self.graph.path(node)}/{node.name}"

    def branch(self, adds: fx.Node, end: fx.Node, stream: fx.Node) -> Branch | str:
        """The branch that ends in this term; else why it is none, or "" if it has no weights anyway."""
        if end in self.given or set(self.users(end)) != {adds}:
            return ""
        nodes = self.only_for(end)
        read = {used for node in nodes for used in node.all_input_nodes if used in self.graph.tensors}
        own = [used for used in read if set(self.users(used)) <= nodes]
        tensors = tuple(sorted(self.graph.tensors[node] for node in own))
        weights = [self.graph.tensors[used] for used in read if self.weighs(self.graph.tensors[used])]
        if not weights:
            return ""
        if not self.computed_from(nodes, stream):
            shortcut = self.only_for(stream) if set(self.users(stream)) == {adds} else frozenset()
            parallel = self.read_by(shortcut) & self.read_by(nodes) and self.layers(shortcut)
            return "the shortcut has layers of its own" if parallel else ""
        if len({tuple(value(node).shape) for node in (end, adds, stream)}) > 1:
            return "the shapes of its terms differ"
        for name in weights:
            if name not in tensors or name in self.tied:
                return f"{name} is used elsewhere too"
        for node in nodes:
            if any(viewed_of(target) not in nodes for target in written(node) if target not in own):
                return f"{node.name} writes to a tensor that others read"
        edge = self.edge(end, nodes)
        if not edge:
            return "its last operator has no edge of its own"
        return Branch(self.named(adds), adds, stream, end, edge, nodes, tensors)

    def weighs(self, name: str) -> bool:
        return name in self.parameters and self.parameters[name].ndim >= MATRIX

    def layers(self, nodes: Collection[fx.Node]) -> bool:
        read = {used for node in nodes for used in node.all_input_nodes if used in self.graph.tensors}
        return any(self.weighs(self.graph.tensors[used]) for used in read)

    def read_by(self, nodes: Collection[fx.Node]) -> set[fx.Node]:
        """The results of other operators that these read."""
        return {u for node in nodes for u in node.all_input_nodes if u not in nodes and u not in self.given}

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.graph.live]

    def only_for(self, end: fx.Node) -> frozenset[fx.Node]:
        """The operators whose results reach the output through this one alone."""
        found, open_ = {end}, [end]
        while open_:
            for used in open_.pop().all_input_nodes:
                if used not in found and used not in self.given and set(self.users(used)) <= found:
                    found.add(used)
                    open_.append(used)
        return frozenset(found)

    def computed_from(self, nodes: Collection[fx.Node], stream: fx.Node) -> bool:
        """Whether these operators read something computed from the stream, or from a term of its sum."""
        terms = set(self.terms(stream))
        oldest = min((self.place[term] for term in terms), default=len(self.place))
        seen, open_ = set[fx.Node](), list(nodes)
        while open_:
            for used in open_.pop().all_input_nodes:
                if used in terms:
                    return True
                if used not in seen and self.place[used] > oldest:
                    seen.add(used)
                    open_.append(used)
        return False

    def terms(self, node: fx.Node) -> Iterator[fx.Node]:
        """The stream, and the tensors that it is a sum or a view of."""
        open_, seen = [node], set[fx.Node]()
        while open_:
            if (node := open_.pop()) in seen or node in self.graph.tensors:
                continue
            seen.add(node)
            yield node
            if op_name(node) in PASSES:
                open_ += [used for used in node.all_input_nodes if used not in self.given]

    def edge(self, node: fx.Node, nodes: Collection[fx.Node]) -> str:
        """The edge of which this operator's output is a view or a copy; "" if there is none in the branch."""
        while (node, None) not in self.graph.made:
            several = [value(used) for used in node.all_input_nodes if used not in self.graph.tensors]
            if len(several) != 1 or len(values(node)) != 1 or op_name(node) not in PASSES:
                return ""
            node = first(node)
            if node not in nodes or set(self.users(node)) - set(nodes):
                return ""
        return self.graph.made[node, None]
