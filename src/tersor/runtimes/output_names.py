"""Output names: a written file has the names of the model's own output, and of its arguments.

{"logits": a, "states": (b, c)}  ->  logits, states.0, states.1
torch's exporter names outputs after the operators that compute them: add_3. Outputs that the model itself
does not name (a tensor, a tuple) keep those names. It names inputs in small letters, with _ between keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tersor.model.outputs import parts_of


def names_of(output: Any) -> list[str]:
    """The name of each tensor of a model's output, in order; none unless the output is a mapping."""
    return list(paths(output)) if isinstance(output, Mapping) else []


def paths(output: Any, path: str = "") -> Iterator[str]:
    """The keys that lead to each tensor, joined by dots."""
    for name, _ in tensors_by_path(output, path):
        yield name


def tensors_by_path(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, each with the keys that lead to it, joined by dots."""
    if isinstance(value, Tensor):
        yield path, value
    for key, part in parts_of(value).items():
        yield from tensors_by_path(part, f"{path}.{key}".lstrip("."))


def name_inputs(graph: Any, inputs: Any) -> None:
    """Rename the inputs of an onnx_ir graph as the model's arguments are named, {"pair": (a, b)} -> pair.0,
    pair.1. All keep their names if they are not those that the exporter makes of these."""
    names = {re.sub(r"\W", "_", name.lower()): name for name in paths(inputs)}
    if not isinstance(inputs, Mapping) or {value.name for value in graph.inputs} != names.keys():
        return
    own = {*graph.initializers, *(value.name for node in graph.all_nodes() for value in node.outputs)}
    if len(names) == len(graph.inputs) and not own & {*names.values()}:
        for value in graph.inputs:
            value.name = names[value.name]


def name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Rename the outputs of an onnx_ir graph. All keep their names if one of the new ones has another meaning
    in the graph, or if the graph has other outputs than the model."""
    values = list(graph.outputs)
    if len(names) != len(values) or len({*map(id, values)}) != len(values):
        return
    inside = [*graph.inputs, *graph.initializers.values()]
    inside += [value for node in graph.all_nodes() for value in node.outputs]
    others = {value.name for value in inside if not any(value is output for output in values)}
    # An input that is also an output must keep its name, since it is given by it.
    given = any(value is output for value in graph.inputs for output in values)
    if given or others & set(names) or len({*names}) != len(names):
        return
    for value, name in zip(values, names, strict=True):
        value.name = name
