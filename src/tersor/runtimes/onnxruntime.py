"""ONNX Runtime: write a model to an .onnx file through torch.export, run it, and compare it with PyTorch.

model -> torch.export (ATen graph) -> ONNX operators -> file -> ONNX Runtime on the CPU
Cost: seconds of tracing, a copy of the model, one run of the example in torch and in the runtime. A file that
does not agree with the model is removed.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.dtypes import unexported
from tersor.errors import FormatError, RefusedError, SettingError
from tersor.model.batches import device_of, move, shapes, steady
from tersor.model.deployed import Deployed
from tersor.model.edges import Edge
from tersor.model.grid_part import uses
from tersor.model.outputs import exportable
from tersor.runtimes import onnx_halves, onnx_integers, onnx_packed, onnxruntime_session
from tersor.runtimes.agree import (
    TOLERANCE,
    Difference,
    Inputs,
    as_inputs,
    compared,
    feed_of,
    name_of,
    sized,
    tensors,
)
from tersor.runtimes.dynamic import dims, variants
from tersor.runtimes.onnx_zeros import without_sums_of_zeros
from tersor.runtimes.onnxruntime_session import Session, open
from tersor.runtimes.operators import Operator
from tersor.runtimes.output_names import name_inputs, name_outputs, names_of
from tersor.runtimes.sessions import brief
from tersor.runtimes.written import Written, into_place, workshop

__all__ = ["Session", "compare", "open", "operators", "write"]

ONE_FILE = 1 << 31  # bytes; protobuf cannot hold more, so larger weights go to a file beside the model

# The tracer's errors for a model that it cannot trace. It reports errors of the user's code as these, too.
UNTRACEABLE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# Where the setting is given depends on what was called.
FIXED_BATCH = (
    "if its batch size cannot vary, give dynamic_batch=false to the step export, or --no-dynamic-batch to "
    "tersor export"
)


def write(
    model: nn.Module,
    example: Inputs,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    dynamic_axes: Sequence[int] = (),
    tolerance: float = TOLERANCE,
    openvino: bool = False,
) -> Written:
    """Write the model to `path` (.onnx) and run it there once. `openvino`: OpenVINO must load it too.

    `example`: inputs of the model: a tuple, a dict by name, or one tensor. The first dimension B of each
    tensor is the batch. With `dynamic_batch` the file takes any B, and any size along `dynamic_axes`
    (dynamic.py). `tolerance` bounds the difference from torch's outputs, relative to the largest. The model
    is copied; its mode and the random state stay as they were. RefusedError if the model cannot be exported
    or the file disagrees with it; StorageError for the disk. In both cases an earlier file at `path` stays as
    it was.
    """
    path, inputs = Path(path), as_inputs(example)
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"onnxruntime: the model is a {type(model).__name__}, but it must be a torch.nn.Module"
        )
    if path.suffix != ".onnx":
        raise SettingError(f"onnxruntime: {path.name!r} must be an ONNX file; name it {path.stem}.onnx")
    if not tensors(inputs):
        raise SettingError(f"onnxruntime: the example holds no tensor: {shapes(inputs)}")
    inputs = move(inputs, device_of(model))
    with workshop(path) as folder, steady():
        traced = inputs
        if dynamic_batch and tensors(inputs)[0].shape[:1] == (1,):  # tracing takes a size of 1 for a constant
            traced = sized(inputs, 2)
        rounded = _rounded(model, traced) if isinstance(model, Deployed) else {}
        program, left, names = _export(model, traced, dynamic_batch, dynamic_axes)
        without_sums_of_zeros(program.model)
        floats, halves = dict[str, str](), dict[str, str]()
        if isinstance(model, Deployed):
            floats = model.left | onnx_packed.pack(program.model, model.packed, openvino)
            onnx_integers.tidy(program.model, openvino)
            if model.halves:
                halves = onnx_halves.halve(program.model, model.halves)
            wanted = sum(edge.uses for edge in rounded.values())
            grids = uses(program.exported_program)
            if grids != wanted:
                raise RefusedError(
                    f"onnxruntime: {type(model.net).__name__} rounds an edge {wanted} times, and the "
                    f"exported graph {grids} times"
                )
        name_inputs(program.model.graph, inputs)
        name_outputs(program.model.graph, names)  # last: the changes above may make an output anew
        _without_traces(program)
        # Only the weights' bytes count: the graph is small compared with the limit.
        large = nbytes(program) >= ONE_FILE
        program.save(str(folder / path.name), external_data=large)
        batches = variants(model, inputs, dynamic_batch, dynamic_axes)
        try:
            compared("onnxruntime", model, folder / path.name, batches, tolerance, first=True)
        except (FormatError, SettingError, *UNTRACEABLE) as error:
            text = str(error).replace(str(folder / path.name), path.name)
            # Without a kernel, or with a dtype that arrays lack, no batch would run.
            way_out = few_kernels(model) if isinstance(error, FormatError) or bfloat16(model) else ""
            way_out = way_out or (f"; {FIXED_BATCH}" if dynamic_batch else "")
            way_out += "; weights=float writes only operators of the standard" if floats else ""
            raise RefusedError(
                f"onnxruntime: {name_of(model)} exports and does not run: {text}{way_out}"
            ) from error
        return replace(into_place(folder, path), left_out=left, floats=floats, halves=halves)


def compare(
    model: nn.Module, path: str | Path, batches: Iterable[Any], *, tolerance: float | None = TOLERANCE
) -> Difference:
    """Run batches of inputs through the model and through the file. As agree.compared."""
    return compared("onnxruntime", model, path, batches, tolerance)


def operators(path: str | Path, inputs: Any, threads: int = 1) -> list[Operator]:
    """What ONNX Runtime executes for these inputs, in order: a tuple, a dict by name, or one tensor."""
    return onnxruntime_session.operators(path, feed_of(as_inputs(inputs)), threads)


def _rounded(model: Deployed, inputs: Inputs) -> dict[str, Edge]:
    """The edges with grids. RefusedError for one that is no float32, as operators on integers need."""
    edges = model.rounded(inputs)
    for name, edge in edges.items():
        if edge.dtype != "float32":
            raise RefusedError(
                f"onnxruntime: the edge {name} is {edge.dtype}, and operators on integers read and write "
                f"float32. Quantize the model in float32: model.float(), with inputs of float32"
            )
    return edges


def _export(
    model: nn.Module, inputs: Inputs, dynamic_batch: bool, axes: Sequence[int]
) -> tuple[Any, tuple[str, ...], list[str]]:
    """(an ONNX program in memory, the outputs that it lacks because torch.export has no type for them, the
    names of those that it has). It is made from a copy of the model, since tracing may leave its own tensors
    in modules."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    # By name: arguments in order may all belong to one name, as of forward(*images).
    by_name = kwargs or dict(inspect.signature(model.forward).bind(*args).arguments)
    dynamic = dims(by_name, dynamic_batch, axes)
    with _quiet():
        try:
            clone, left = copy.deepcopy(model).eval(), {}
            names: list[str] = []
            forward = clone.forward

            @wraps(forward)
            def known(*args: Any, **kwargs: Any) -> Any:
                made, odd = exportable(forward(*args, **kwargs))
                left.update(odd)
                names[:] = names_of(made)
                if not tensors(made):
                    raise TypeError("its output holds no tensor that torch.export has a type for")
                return made

            clone.forward = known
            if codes := isinstance(clone, Deployed):
                clone.spell()
            program: Any = torch.onnx.export(
                clone,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=dynamic,
                verbose=False,
                external_data=False,
                custom_translation_table=onnx_integers.table(),
                opset_version=onnx_integers.OPSET if codes else None,
            )
        except UNTRACEABLE as error:
            way_out = f" {FIXED_BATCH[0].upper()}{FIXED_BATCH[1:]}." if dynamic_batch else ""
            way_out = " If its sizes cannot vary, leave dynamic_axes out." if axes else way_out
            raise RefusedError(
                f"onnxruntime: {name_of(model)} cannot be exported with inputs {shapes(inputs)}: "
                f"{brief(error)}.{unexported(model.state_dict())}{way_out}"
            ) from error
    return program, tuple(f"{name} ({kind})" for name, kind in left.items()), names


def few_kernels(model: nn.Module) -> str:
    """What to do about floats of dtypes for which the runtime has few kernels; empty if there are none."""
    kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}))
    return f"; it has few kernels for {names}: give the model in float32, model.float()" if names else ""


def bfloat16(model: nn.Module) -> bool:
    return any(tensor.dtype is torch.bfloat16 for tensor in model.state_dict().values())


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, log lines or dumped graphs from the exporter: errors are raised."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def nbytes(program: Any) -> int:
    """Bytes of the weights of an ONNX program."""
    return sum(value.const_value.nbytes for value in program.model.graph.initializers.values())


def _without_traces(program: Any) -> None:
    """Remove the stack trace of each operator: these take several times the graph's bytes, and hold paths of
    this machine."""
    for graph in (program.model.graph, *(function.graph for function in program.model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    program.model.metadata_props.clear()
