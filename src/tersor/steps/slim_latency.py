"""Slim latency: what units cost in a runtime, from a table of measured times of operators.

ms = sum over convolutions and linear layers of time(operator, inputs, outputs)      runtimes/latency_table.py
A sum of operators leaves out what is between them, so it only steers the choice: the cut network is exported,
and timed beside the whole one. Widths that the kernels like come out of the table: where 24 channels take as
long as 32, nothing is gained and nothing is taken.
Cost: 80 ms for each new operator and width, once a machine; seconds for each network that is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from tersor.core.view import View
from tersor.maths.allocation import Cost, Term
from tersor.measure.latency import interleave, ratio
from tersor.model.channels.costs import Widths
from tersor.model.channels.groups import Groups
from tersor.model.channels.own_module import Plan
from tersor.model.example import example_inputs
from tersor.model.graph import arguments, first, op_name, value
from tersor.runtimes import runtime
from tersor.runtimes.agree import sized, tensors
from tersor.runtimes.latency_table import LatencyTable, Operator

if TYPE_CHECKING:
    from tersor.steps.units import Settings, Timing, Units

ROUNDS, BURST_MS = 15, 4.0
CONVOLUTIONS = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")


class Stopwatch:
    """Times networks in a runtime, each beside the whole one."""

    def __init__(self, view: View, step: Timing):
        self.view, self.step = view.part, step
        self.writer = runtime(step.runtime)
        self.inputs = sized(example_inputs(self.view.task, self.view.plain()), step.batch)
        self.ms = self.against(self.view.plain())[0]

    def share(self, view: View) -> float:
        """The time of a later view's model over that of the whole one."""
        return self.against(view.part.plain())[1]

    def against(self, model: nn.Module) -> tuple[float, float]:
        """(ms of the whole model, time of this one over it), in turn in one process."""
        named = self.inputs if isinstance(self.inputs, dict) else {}
        arrays = [] if named else tensors(self.inputs)
        by_name = {name: item for name, item in named.items() if isinstance(item, Tensor)}
        with tempfile.TemporaryDirectory() as folder:
            runs: dict[str, Callable[[], object]] = {}
            for word, each in (("whole", self.view.plain()), ("cut", model)):
                path = Path(folder) / f"{word}.onnx"
                self.writer.write(each, self.inputs, path, dynamic_batch=False)
                session = self.writer.open(path, threads=self.step.threads)
                runs[word] = partial(session.run, *arrays, **by_name)
            found = interleave(runs, rounds=ROUNDS, burst_ms=BURST_MS)
        return found["whole"].median_ms, ratio(found["cut"], found["whole"]).middle


class Latency(Stopwatch):
    """The whole model in the runtime, and costs of its units."""

    def __init__(self, units: Units, step: Settings):
        self.own, self.table = units.own, LatencyTable(step.runtime, step.threads)
        super().__init__(units.view, step)
        self.cost = Cost(list(self.terms(units.groups, Widths(units.groups, units.families))))

    def ratio(self, plan: Plan) -> float:
        """The time of the cut model over that of the whole one."""
        return self.against(self.own.build(plan.cuts, plan.sets))[1]

    def terms(self, groups: Groups, widths: Widths) -> Iterator[Term]:
        for node in groups.nodes():
            given = arguments(node)
            weight = given.get("weight")
            if not isinstance(weight, fx.Node) or groups.walk.labels.get(weight) is None:
                continue
            label, name = groups.walk.labels[weight], op_name(node)
            if name in CONVOLUTIONS:
                axes = [groups.walk.labels[first(node)][1], groups.walk.labels[node][1]]
                make = convolution(node, given, self.step.batch)
            elif name == "linear" and len(label) == 2:
                axes, make = [label[1], label[0]], linear(node, self.step.batch)
            else:
                continue
            both = tuple(widths.of(atoms) for atoms in axes)
            yield Term(1.0, both, partial(self.time, make))

    def time(self, make: Callable[[int, int], Operator], inputs: float, outputs: float) -> float:
        return self.table.ms(make(max(round(inputs), 1), max(round(outputs), 1)))


def operator_times(nodes: Iterable[fx.Node], step: Timing) -> dict[fx.Node, float]:
    """The time of each convolution and linear layer, in ms, from the table."""
    table, found = LatencyTable(step.runtime, step.threads), dict[fx.Node, float]()
    for node in nodes:
        given, name = arguments(node), op_name(node)
        if not isinstance(given.get("weight"), fx.Node):
            continue
        if name in CONVOLUTIONS:
            make, axis = convolution(node, given, step.batch), 1
        elif name == "linear" and value(given["weight"]).ndim == 2:
            make, axis = linear(node, step.batch), -1
        else:
            continue
        inputs, outputs = (int(value(each).shape[axis]) for each in (first(node), node))
        found[node] = table.ms(make(inputs, outputs))
    return found


def linear(node: fx.Node, batch: int) -> Callable[[int, int], Operator]:
    rows = tuple(map(int, value(node).shape))[1:-1]
    return lambda i, o: Operator("linear", i, o, batch, rows)


def convolution(node: fx.Node, given: dict[str, Any], batch: int) -> Callable[[int, int], Operator]:
    before = tuple(map(int, value(first(node)).shape))
    weight = tuple(map(int, value(given["weight"]).shape))
    axes, groups = len(weight) - 2, int(given.get("groups") or 1)
    turned = "transpose" in op_name(node)
    each = before[1] // groups

    def make(inputs: int, outputs: int) -> Operator:
        count = groups if groups == 1 else max(inputs // each, 1)  # whole groups go
        inputs, outputs = (n if n % count == 0 else -(-n // count) * count for n in (inputs, outputs))
        return Operator(
            "transposed" if turned else "conv", inputs, outputs, batch, before[2:], weight[2:],
            spread(given.get("stride"), axes, 1), padding(given.get("padding"), axes, weight[2:], given),
            spread(given.get("dilation"), axes, 1), count,
            spread(given.get("output_padding"), axes, 0) if turned else (),
        )  # fmt: skip

    return make


def spread(given: Any, axes: int, default: int) -> tuple[int, ...]:
    """One number for each axis."""
    found = [default] if given is None else [given] if isinstance(given, int) else list(given)
    return tuple(map(int, found * axes if len(found) == 1 else found))


def padding(given: Any, axes: int, kernel: tuple[int, ...], other: dict[str, Any]) -> tuple[int, ...]:
    """Begins and ends; "same" puts what is odd at the end."""
    if given == "same":
        whole = [d * (k - 1) for d, k in zip(spread(other.get("dilation"), axes, 1), kernel, strict=True)]
        return (*(n // 2 for n in whole), *(n - n // 2 for n in whole))
    return (0,) * axes if given == "valid" else spread(given, axes, 0)
