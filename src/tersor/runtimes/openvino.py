"""OpenVINO: run the ONNX file that is also ONNX Runtime's, and compare it with PyTorch.

model -> onnxruntime.write -> the same file, loaded by OpenVINO on the CPU -> outputs compared with torch's
Cost: that of onnxruntime.write, and one more load and run in a child process, 0.2 to 0.5 s for a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.errors import FormatError, RefusedError, SettingError
from tersor.model.batches import steady
from tersor.model.deployed import Deployed
from tersor.model.edges import parse
from tersor.model.spelled_lstm import ALL
from tersor.runtimes import onnxruntime, openvino_session
from tersor.runtimes.agree import TOLERANCE, Difference, Inputs, as_inputs, compared, feed_of, name_of
from tersor.runtimes.dynamic import variants
from tersor.runtimes.openvino_session import Session, open
from tersor.runtimes.operators import Operator
from tersor.runtimes.written import Written, into_place, workshop

__all__ = ["Session", "compare", "open", "operators", "write"]


def write(
    model: nn.Module,
    example: Inputs,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    dynamic_axes: Sequence[int] = (),
    tolerance: float = TOLERANCE,
) -> Written:
    """Write the model to `path` (.onnx) as onnxruntime.write does, and run it in OpenVINO too, in float32.

    RefusedError if either runtime disagrees with the model; an earlier file at `path` then stays as it was.
    """
    refuse_lstm(model)
    path = Path(path)
    with workshop(path) as folder, steady():
        written = onnxruntime.write(
            model, example, folder / path.name, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes,
            tolerance=tolerance, openvino=True,
        )  # fmt: skip
        inputs = as_inputs(example)
        batches = variants(model, inputs, dynamic_batch, dynamic_axes)
        try:
            compared("openvino", model, written.path, batches, tolerance, first=True)
        except (SettingError, FormatError) as error:
            text = str(error).replace(str(written.path), path.name)
            raise RefusedError(
                f"openvino: {name_of(model)} runs in ONNX Runtime and not in OpenVINO: {text}"
            ) from error
        placed = into_place(folder, path)
        return replace(placed, left_out=written.left_out, floats=written.floats, halves=written.halves)


def refuse_lstm(model: nn.Module) -> None:
    """RefusedError for an LSTM that rounds. OpenVINO loads its operator, and computes it without rounding."""
    rounding = [name for name in model.table if name.endswith(ALL)] if isinstance(model, Deployed) else []
    if rounding:
        path = parse(rounding[0])[0]
        raise RefusedError(
            f"openvino: {path or 'the model'}: its LSTM rounds inputs and hidden states, and OpenVINO "
            f"computes it without rounding, in float. Leave its weights out of quantize activations=8, with "
            f"where='*,!{path}.*' for this one, or export to=onnxruntime"
        )


def compare(
    model: nn.Module, path: str | Path, batches: Iterable[Any], *, tolerance: float | None = TOLERANCE
) -> Difference:
    """Run batches of inputs through the model and through the file in OpenVINO. As agree.compared."""
    return compared("openvino", model, path, batches, tolerance)


def operators(path: str | Path, inputs: Any, threads: int = 1, precision: str = "f32") -> list[Operator]:
    """What OpenVINO executes for these inputs, in order: a tuple, a dict by name, or one tensor."""
    return openvino_session.operators(path, feed_of(as_inputs(inputs)), threads, precision)
