"""ONNX Runtime: write a model to an .onnx file through torch.export, run it, and compare it with PyTorch.

model -> torch.export (ATen graph) -> ONNX operators -> file -> ONNX Runtime on the CPU
Cost: seconds of tracing, a copy of the model, one run of the example in torch and in the runtime. A file that
does not agree with the model is removed.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as states
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.dtypes import unexported
from tersor.errors import FormatError, RefusedError, SettingError, StorageError
from tersor.model.batches import device_of, move, shapes, steady
from tersor.model.deployed import Deployed
from tersor.model.outputs import exportable
from tersor.runtimes import onnx_integers
from tersor.runtimes.agree import Comparison, Difference, Inputs, as_inputs, outputs, sized, tensors
from tersor.runtimes.output_names import name_outputs, names_of
from tersor.runtimes.written import Written, into_place, workshop

TOLERANCE = 1e-3  # largest allowed difference over the largest output: float32 sums in another order
# Allowed root mean square of the difference over that of the outputs, where edges have grids: a sum in
# another order can round to the next step, and each later layer sees it. A wrong grid or weight moves more.
INTEGERS = 0.05
ONE_FILE = 1 << 31  # bytes; protobuf cannot hold more, so larger weights go to a file beside the model

# The tracer's errors for a model that it cannot trace. It reports errors of the user's code as these, too.
UNTRACEABLE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
BROKEN = (
    states.InvalidProtobuf,
    states.InvalidGraph,
    states.Fail,
    states.NotImplemented,
    states.RuntimeException,
    states.InvalidArgument,
)


def write(
    model: nn.Module,
    example: Inputs,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> Written:
    """Write the model to `path` (.onnx) and run it there once.

    `example`: inputs of the model: a tuple, a dict by name, or one tensor. The first dimension B of each
    tensor is the batch. With `dynamic_batch` the file takes any B. `tolerance` bounds the difference from
    torch's outputs, relative to the largest. The model is copied; its mode and the random state stay as they
    were. RefusedError if the model cannot be exported or the file disagrees with it; StorageError for the
    disk. In both cases an earlier file at `path` stays as it was.
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
        program, left = _export(model, traced, dynamic_batch)
        grids = onnx_integers.tidy(program.model)
        if isinstance(model, Deployed) and grids != (uses := model.uses(traced)):
            raise RefusedError(
                f"onnxruntime: {type(model.net).__name__} uses grids {uses} times, and the exported graph "
                f"{grids} times"
            )
        _without_traces(program)
        # Only the weights' bytes count: the graph is small compared with the limit.
        large = nbytes(program) >= ONE_FILE
        program.save(str(folder / path.name), external_data=large)
        # Another batch size than the traced one, so that a size frozen into the graph is found.
        batches = [inputs, sized(inputs, 1)] if dynamic_batch else [inputs]
        try:
            compare(model, folder / path.name, batches, tolerance=tolerance)
        except (SettingError, *UNTRACEABLE) as error:
            way_out = "; if its batch size cannot vary, give dynamic_batch=false" if dynamic_batch else ""
            raise RefusedError(
                f"onnxruntime: {type(model).__name__} exports and does not run: {error}{way_out}"
            ) from error
        return replace(into_place(folder, path), left_out=left)


def open(path: str | Path, threads: int = 1) -> Session:
    """Load an ONNX file to run on `threads` CPU threads. FormatError if it is not an ONNX file."""
    if not isinstance(threads, int) or threads < 1:
        raise SettingError(f"onnxruntime: threads={threads!r}, but it is a number of CPU threads, 1 or more")
    path = Path(path)
    if not path.is_file():
        raise StorageError(f"{path}: no such file")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # errors are raised as exceptions; nothing else is printed
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (*BROKEN, states.NoSuchFile) as error:
        raise FormatError(f"{path}: ONNX Runtime cannot load it: {_brief(error)}") from error
    return Session(session, path)


class Session:
    """A loaded model. `inputs` and `outputs` are the names, in order."""

    def __init__(self, session: ort.InferenceSession, path: Path):
        self._session, self.path = session, path
        self.inputs = [item.name for item in session.get_inputs()]
        self.outputs = [item.name for item in session.get_outputs()]

    def run(self, *arrays: np.ndarray | Tensor, **named: np.ndarray | Tensor) -> list[np.ndarray]:
        """All outputs, as arrays. Inputs in the file's order, or by name. SettingError if they do not fit."""
        feed = dict(zip(self.inputs, arrays, strict=False)) | named
        if len(arrays) + len(named) != len(self.inputs) or set(feed) != set(self.inputs):
            raise SettingError(
                f"{self.path.name}: it takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), but given "
                f"were {len(arrays)} in order and {', '.join(named) or 'none'} by name."
            )
        plain = {
            name: item.detach().cpu().numpy() if isinstance(item, Tensor) else item
            for name, item in feed.items()
        }
        try:
            found: list[np.ndarray] = self._session.run(None, plain)
        except (*BROKEN, RuntimeError, ValueError) as error:
            raise SettingError(
                f"{self.path.name}: inputs {shapes(plain)} do not run: {_brief(error)}"
            ) from error
        return found


def compare(
    model: nn.Module, path: str | Path, batches: Iterable[Any], *, tolerance: float | None = TOLERANCE
) -> Difference:
    """Run batches of inputs through the model and through the file.

    RefusedError if they differ by more than `tolerance`, relative to the largest output; by more than
    INTEGERS if edges have grids. None allows any difference.
    """
    session, comparison = open(path), Comparison()
    for batch in batches:
        inputs = as_inputs(batch)
        if isinstance(inputs, dict):
            theirs = session.run(**{name: item for name, item in inputs.items() if isinstance(item, Tensor)})
        else:
            theirs = session.run(*tensors(inputs))
        comparison.add(outputs(model, inputs), theirs)
    found = comparison.result()
    if tolerance is None:
        return found
    apart, of = found.max_rel, "the largest"
    if isinstance(model, Deployed):
        apart, of, tolerance = found.rms_rel, "their size (root mean square)", INTEGERS
    if not apart <= tolerance:
        raise RefusedError(
            f"onnxruntime: {Path(path).name} does not compute what {type(model).__name__} does: they differ "
            f"by {found.max_abs:.3g}, {apart:.3g} of {of}; allowed: {tolerance:.3g}."
        )
    return found


def _export(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> tuple[Any, tuple[str, ...]]:
    """(an ONNX program in memory, the outputs that it lacks because torch.export has no type for them). It is
    made from a copy of the model, since tracing may leave its own tensors in modules."""
    batch = torch.export.Dim("batch")
    size = tensors(inputs)[0].shape[:1]

    def dims(item: Any) -> dict[int, Any] | None:
        moves = isinstance(item, Tensor) and item.ndim > 0 and item.shape[:1] == size
        return {0: batch} if moves and dynamic_batch else None

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    dynamic = tree_map(dims, inputs) if dynamic_batch else None
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
            if integers := isinstance(clone, Deployed):
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
                opset_version=onnx_integers.OPSET if integers else None,
            )
        except UNTRACEABLE as error:
            way_out = " If its batch size cannot vary, give dynamic_batch=false." if dynamic_batch else ""
            raise RefusedError(
                f"onnxruntime: {type(model).__name__} cannot be exported with inputs {shapes(inputs)}: "
                f"{_brief(error)}.{unexported(model.state_dict())}{way_out}"
            ) from error
    name_outputs(program.model.graph, names)
    return program, tuple(f"{name} ({kind})" for name, kind in left.items())


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


def _brief(error: BaseException) -> str:
    """The innermost cause in one line: exporters add pages of advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}".rstrip(".")
