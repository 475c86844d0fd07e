"""Integer edges: which edges need a grid, so that a runtime computes with integers.

weighted   convolutions, linear layers, matrix products: the activations that they read need grids
conv       needs a grid on its output too: integer kernels of convolutions have no float output
products   matrix products of two activations, as in attention, whose probabilities need a grid too. Symmetric
           grids, where only products read them: OpenVINO's integer attention has no zero points
joins      additions, products, concatenations, average pools: if all that they read has grids, and an integer
           operator reads the result
read       where a float operator reads an edge too, only what the integer operator reads gets the grid
clipped    a grid after relu or clamp clips as they do, so the operator before them needs none
dynamic    with ranges of each batch only products with a weight on the right, as in linear layers. Each one
           rounds what it reads, and gives floats. ConvInteger is 1.6 times slower than float
           in ResNet-20, and its products with int8 weights 2 to 18 times: convolutions stay in float
lstm       with ranges of each batch only: it rounds its hidden states at each step (spelled_lstm.py). All its
           matrices must be integers. GRUs and other recurrent layers have no integer kernel
The rest computes in float between two grids. Views and max pools pass values on. From one trace: graph.py.
Source: the patterns that ONNX Runtime's and OpenVINO's optimizers replace by integer kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import fx

from tersor.model.graph import Graph, arguments, op_name, value
from tersor.model.integer_ops import (
    ACTIVATIONS,
    BIASES,
    CLIPS,
    CONVS,
    JOINS,
    LSTM,
    MOVES,
    MULTIPLIED,
    PAIRS,
    PASSED,
    POOLS,
    PRODUCTS,
    WEIGHTED,
    IntegerLayer,
    floats,
    joined,
    why_no_kernel,
)
from tersor.model.ops import OPS
from tersor.model.spelled_attention import INSIDE
from tersor.model.spelled_lstm import ALL

MOVING = "lstm computes in float, except with activation_range=dynamic"


@dataclass(eq=False)
class IntegerEdges:
    """The choice for one graph."""

    graph: Graph
    inputs: Sequence[str]  # the edges of the model's arguments: watch.input_names; none of those of a part
    chosen: frozenset[str]  # the weights that are integers
    refused: frozenset[str] = frozenset()  # edges that no grid can hold
    dynamic: bool = False  # for grids whose ranges are those of each batch
    products: bool = True  # whether products of two activations are integers too

    @cached_property
    def names(self) -> dict[fx.Node, str]:
        """The edge that each operator or argument makes, where it makes one."""
        found = {node: name for (node, _), name in reversed(self.graph.made.items())}
        given = self.graph.program.graph_signature.user_inputs
        places = dict(zip(given, self.inputs, strict=True)) if self.inputs else {}
        moving = [node for node in self.graph.inputs if floats(node) and node.name in places]
        found |= {part: self.graph.made[made] for made, part in self.graph.parts.items()}
        return found | {node: places[node.name] for node in moving}

    def op(self, node: fx.Node) -> str | None:
        return OPS.get(op_name(node)) if node.op == "call_function" else None

    def source(self, node: fx.Node) -> fx.Node:
        """The operator or argument whose values this node passes on."""
        while node.op == "call_function" and (op_name(node) in MOVES or self.op(node) in PASSED):
            before = node.args[0]
            if not isinstance(before, fx.Node):
                break
            if op_name(node) == "getitem" and self.op(before) not in PASSED:
                node = self.graph.parts.get((before, cast(int, node.args[1])), before)
                if node is not before:
                    break
            node = before
        return node

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The sources of the activations that an operator reads."""
        op = self.op(node) or ""
        if op == "cat":
            given = arguments(node).get("tensors", ())
            return [self.source(item) for item in given if isinstance(item, fx.Node)]
        first, last = ACTIVATIONS.get(op, (0, 2 if op in JOINS and op not in POOLS else 1))
        return [self.source(item) for item in node.args[first:last] if isinstance(item, fx.Node)]

    @cached_property
    def readers(self) -> dict[fx.Node, list[fx.Node]]:
        """For each source, the operators with edges that read it, and the output of the graph."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in (*self.graph.nodes, self.graph.output):
            if node.op == "output" or (self.op(node) not in PASSED and op_name(node) not in MOVES):
                for source in dict.fromkeys(self.source(item) for item in node.all_input_nodes):
                    found.setdefault(source, []).append(node)
        return found

    @cached_property
    def weighted(self) -> dict[fx.Node, list[fx.Node]]:
        """Operators that multiply activations, and their operands that depend on the input."""
        found = {}
        kinds = (*PRODUCTS, LSTM) if self.dynamic else WEIGHTED
        for node in self.graph.nodes:
            made = node in self.names and node not in self.graph.constant  # complex ones have no name
            if self.op(node) in kinds and made and node in self.graph.live:
                operands = [item for item in self.reads(node) if self.moving(item)]
                held = {place for item in operands for place in self.places(node, item)}
                held |= {self.names[item] for item in operands if item in self.names} | {*self.inside(node)}
                if operands and not held & self.refused and self.fits(node, operands):
                    found[node] = operands
        return found

    def fits(self, node: fx.Node, operands: list[fx.Node]) -> bool:
        """Whether the weights that an operator multiplies by are chosen; for a product of activations, one of
        the weights beside it."""
        weights, op = {*self.multiplied(node)}, self.op(node) or ""
        if self.dynamic:
            return weights <= self.chosen and self.by_weight(node)
        first, last = ACTIVATIONS.get(op, (0, 1))
        if op != "addmm" and len(operands) == last - first > 1:
            return self.products and bool(self.beside(node) & self.chosen)
        return weights <= self.chosen and (op not in PAIRS or bool(weights))

    def beside(self, node: fx.Node) -> set[str]:
        """The matrices and kernels of the innermost module around an operator that has some."""
        path = self.graph.path(node)
        while True:
            inside = f"{path}." if path else ""
            tensors = self.graph.tensors.items()
            found = {name for at, name in tensors if name.startswith(inside) and value(at).ndim > 1}
            if found or not path:
                return found
            path = path.rpartition(".")[0]

    @cached_property
    def pairs(self) -> list[fx.Node]:
        """The products of activations that are integers."""
        return [node for node in self.weighted if not self.multiplied(node) and self.op(node) in PAIRS]

    @cached_property
    def between(self) -> int:
        """How many products of activations are integers: attention computes two."""
        return sum(1 + len(self.inside(node)) for node in self.pairs)

    def inside(self, node: fx.Node) -> list[str]:
        """The names of the edges within an operator."""
        return [f"{self.names[node]}{INSIDE}"] if self.op(node) == "attention" else []

    @cached_property
    def symmetric(self) -> set[str]:
        """Edges that products of activations read, and no other integer operator."""
        others = {*self.weighted, *self.joins}.difference(self.pairs)
        pairs = {node: self.weighted[node] for node in self.pairs}
        alone = {
            item for operands in pairs.values() for item in operands
            if item in self.names and others.isdisjoint(self.readers[item])
        }  # fmt: skip
        places = {place for node, read in pairs.items() for item in read for place in self.places(node, item)}
        return {self.names[item] for item in alone} | places

    def by_weight(self, node: fx.Node) -> bool:
        """Whether an operator multiplies from the right by a weight, a matrix. Of an LSTM all are weights."""
        if self.op(node) == LSTM:
            return not why_no_kernel(node, self.graph.tensors)
        last = node.args[PRODUCTS[self.op(node) or ""]]
        return isinstance(last, fx.Node) and self.source(last) in self.graph.tensors and value(last).ndim == 2

    def moving(self, node: fx.Node) -> bool:
        """Whether a node's values depend on the model's arguments."""
        return node in self.graph.inputs or (node.op == "call_function" and node not in self.graph.constant)

    def clipped(self, node: fx.Node) -> bool:
        """Whether only operators that clip read this node."""
        readers = self.readers.get(node, [])
        return bool(readers) and all(self.op(reader) in CLIPS for reader in readers)

    def unclipped(self, node: fx.Node) -> fx.Node:
        """The operator before those that clip."""
        while self.op(node) in CLIPS:
            before = self.source(node.args[0])  # type: ignore[arg-type]
            if not self.clipped(before):
                break
            node = before
        return node

    @cached_property
    def joins(self) -> set[fx.Node]:
        """Joins that compute with integers: what they read comes from integer operators, and an integer
        operator reads them. Found by removing others until none is left."""
        found = set() if self.dynamic else {
            node for node in self.graph.nodes
            if joined(node, self.op(node)) and node not in self.graph.constant
            and node in self.graph.live and self.names.get(node, "") not in ("", *self.refused)
        }  # fmt: skip
        while True:
            whole = {*self.weighted, *found}
            fits = {node for node in found if self.from_integers(node, whole) and self.into(node, whole)}
            if fits == found:
                return found
            found = fits

    def from_integers(self, node: fx.Node, whole: set[fx.Node]) -> bool:
        reads, op = self.reads(node), self.op(node)
        wanted = 1 if op in POOLS else len(cast(list, node.args[0])) if op == "cat" else 2
        if len(reads) < wanted:  # a number, or an argument by name
            return False
        named = {item for item in self.graph.inputs if item in self.names}
        return bool(reads) and all(item in named or self.unclipped(item) in whole for item in reads)

    def into(self, node: fx.Node, whole: set[fx.Node]) -> bool:
        """Whether an integer operator reads this node, directly or after clipping."""
        todo, seen = [node], set()
        while todo:
            for reader in self.readers.get(todo.pop(), []):
                if reader in whole:
                    return True
                if self.op(reader) in CLIPS and reader not in seen:
                    seen.add(reader)
                    todo.append(reader)
        return False

    @cached_property
    def edges(self) -> list[str]:
        """The edges that get a grid, in the order of the forward."""
        wanted: set[fx.Node] = set()
        for node, operands in self.weighted.items():
            wanted.update(operands)
            if self.op(node) in CONVS:
                wanted.update(self.after(node))
        for node in self.joins:
            wanted.update((*self.reads(node), *self.after(node)))
        found = []
        for node in (*self.graph.inputs, *self.graph.nodes):
            for item in self.weighted.get(node, ()):
                found += [] if self.whole(item) else self.places(node, item)
            found += self.inside(node) if node in self.weighted else []
            if node in wanted and node in self.names and self.whole(node):
                found.append(self.names[node])
        return [name for name in dict.fromkeys(found) if name not in self.refused]

    def whole(self, node: fx.Node) -> bool:
        """Whether a node's values are rounded for all that read them. If a float operator reads them too, and
        no integer operator makes them, or if they have no name, only what integer operators read is: a
        residual stream stays exact."""
        if self.dynamic:
            return False
        integers = {*self.weighted, *self.joins}
        if self.unclipped(node) in integers:
            return True
        return node in self.names and all(reader in integers for reader in self.readers.get(node, []))

    def item(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """What an operator itself reads of a source: perhaps a view of it."""
        return next(a for a in node.args if isinstance(a, fx.Node) and self.source(a) is source)

    def places(self, node: fx.Node, source: fx.Node) -> list[str]:
        """The names of what this operator alone reads of a source."""
        if self.op(node) == LSTM:
            return [f"{self.names[node]}{ALL}"]
        first, last = ACTIVATIONS.get(self.op(node) or "", (0, 1))
        return [
            f"{self.names[node]}<{at}" for at in range(first, min(last, len(node.args)))
            if isinstance(item := node.args[at], fx.Node) and self.source(item) is source
        ]  # fmt: skip

    def after(self, node: fx.Node) -> list[fx.Node]:
        """Where the grid of an operator's output goes: after it, or after what clips it."""
        after = (found for reader in self.readers.get(node, ()) for found in self.after(reader))
        return [*after] if self.clipped(node) else [node]

    @cached_property
    def layers(self) -> list[IntegerLayer]:
        """Layers whose weight can be integers: what multiplies an edge that has a grid."""
        edges, found = set(self.edges), []
        for node, operands in self.weighted.items():
            weights, word = self.multiplied(node), BIASES.get(self.op(node) or "", "bias")
            bias = next((name for name, at in self.tensors(node) if at == word), None)
            if not weights:
                continue
            (name, *_), item = self.places(node, operands[0]), self.item(node, operands[0])
            edge = self.names[operands[0]] if self.whole(operands[0]) else name
            if edge in edges:
                uses = sum(len(at.users) for at, own in self.graph.tensors.items() if own == bias)
                op = self.op(node) or ""
                as_stored = op == LSTM or self.given(node, weights[0]) in self.graph.tensors
                read = name, value(item).ndim, item.name, uses == 1, as_stored
                found += [
                    IntegerLayer(weight, bias, edge, op, *read)
                    for weight in weights[: None if op == LSTM else 1]
                ]
        return found

    def given(self, node: fx.Node, weight: str) -> Any:
        """The argument of an operator that is this weight, or computed from it."""
        return next(arguments(node)[at] for own, at in self.tensors(node) if own == weight)

    def why_float(self, name: str) -> str:
        """Why no integer operator multiplies by this weight."""
        if name in self.graph.unread:
            return "no output depends on it"
        places = {node for node, other in self.graph.tensors.items() if other == name}
        readers = [
            node for node in self.graph.nodes
            if op_name(node) not in MOVES and places & {self.source(item) for item in node.all_input_nodes}
        ]  # fmt: skip
        ops = sorted({self.op(node) or op_name(node) for node in readers})
        if ops == ["embedding"]:
            return "its rows are looked up, not multiplied"
        if ops and self.graph.constant.issuperset(readers):
            return "its layer reads what does not depend on the input"
        if ops and set(ops) <= {*WEIGHTED} and not self.dynamic:
            return "no grid can hold what its layer reads"
        if why := next((why for node in readers if (why := why_no_kernel(node, self.graph.tensors))), ""):
            return why
        if ops == [LSTM]:
            return "other weights of its layer are not chosen, or no integers" if self.dynamic else MOVING
        return f"{' and '.join(ops) or 'what reads it'} computes in float"

    def multiplied(self, node: fx.Node) -> list[str]:
        """The model's tensors that an operator multiplies by."""
        if self.op(node) == LSTM:
            own = [item for item in arguments(node)["params"] if item in self.graph.tensors]
            return [self.graph.tensors[item] for item in own if value(item).ndim == 2]
        bias = BIASES.get(self.op(node) or "")
        return [name for name, word in self.tensors(node) if word in MULTIPLIED and word != bias]

    def tensors(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        """The model's tensors that an operator reads, with the names of the arguments."""
        for word, item in arguments(node).items():
            if isinstance(item, fx.Node) and (source := self.source(item)) in self.graph.tensors:
                yield self.graph.tensors[source], word
