"""OpenVINO session: load an ONNX file, run it, and see which of its operators run in integers.

By itself OpenVINO computes float32 models in bfloat16 on processors that have it, and rounds inputs of layers
with integer weights: float32 is asked for here, and bfloat16 has to be named. Threads are not bound to cores:
they would share one with whatever else is timed in turn. Without torch: see sessions.py.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import FormatError, RefusedError, SettingError, did_you_mean
from tersor.runtimes import imported, sessions
from tersor.runtimes.operators import QUANTIZES, RUNS, Names, Operator, medians
from tersor.runtimes.sessions import Feed, checked

ov = imported("openvino")

PRECISIONS = ("f32", "bf16")
MS = timedelta(milliseconds=1)
CONVERTS = {"Convert", "FakeQuantize", "Reorder", "ShapeOf"}
FAILED = (
    RuntimeError,
    ov.frontend.GeneralFailure,
    ov.frontend.InitializationFailure,
    ov.frontend.NotImplementedFailure,
    ov.frontend.OpConversionFailure,
    ov.frontend.OpValidationFailure,
)


def open(path: str | Path, threads: int = 1, precision: str = "f32") -> Session:
    """Load an ONNX file to run on `threads` CPU threads. `precision`: what float operators compute in, "f32"
    or "bf16". FormatError if it is not an ONNX file, RefusedError if the processor has no bfloat16."""
    path = checked(path, threads, "openvino")
    return Session(_compiled(path, threads, precision, False), path)


class Session(sessions.Session):
    """A file in OpenVINO."""

    broken = (*FAILED, TypeError, ValueError)

    def __init__(self, compiled: Any, path: Path):
        inputs, outputs = (
            [item.get_any_name() for item in side] for side in (compiled.inputs, compiled.outputs)
        )
        sizes = list(compiled.inputs[0].partial_shape) if inputs else []
        fixed = bool(sizes) and sizes[0].is_static
        super().__init__(path, inputs, outputs, sizes[0].get_length() if fixed else None)
        self._request = compiled.create_infer_request()
        self._dtypes = {item.get_any_name(): item.element_type.to_dtype() for item in compiled.inputs}

    def why(self, error: Exception) -> str:
        return _why(error)

    def call(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        for name, dtype in self._dtypes.items():
            # It would convert any number without a word: float64 to float32, floats to indices.
            if getattr(feed[name], "dtype", None) != dtype:
                raise TypeError(f"{name} is to be {dtype}")
        # Inputs are read in place. Copied ones are not compared with the shapes that the file states.
        found = self._request.infer([feed[name] for name in self.inputs], share_inputs=True)
        return list(found.to_tuple())


def operators(path: str | Path, feed: Feed, threads: int = 1, precision: str = "f32") -> list[Operator]:
    """What OpenVINO executes for these inputs, in order. Errors as `open` and `run`."""
    path = checked(path, threads, "openvino")
    compiled = _compiled(path, threads, precision, True)
    session, runs = Session(compiled, path), []
    arrays, named = feed
    for _ in range(RUNS + 1):
        session.run(*arrays, **named)
        done = [item for item in session._request.get_profiling_info() if item.status.name == "EXECUTED"]
        runs.append({item.node_name: item.real_time / MS for item in done})
    nodes = {node.get_friendly_name(): node.get_rt_info() for node in compiled.get_runtime_model().get_ops()}
    names = Names(path)
    return [_operator(name, ms, nodes[name], names) for name, ms in medians(runs[1:]).items()]


def _compiled(path: Path, threads: int, precision: str, profile: bool) -> Any:
    if precision not in PRECISIONS:
        raise SettingError(f"openvino: precision={precision!r}; {did_you_mean(precision, PRECISIONS)}")
    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RefusedError("openvino: precision='bf16', which this processor does not compute in; give 'f32'")
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False, "PERF_COUNT": profile,
    }  # fmt: skip
    if precision == "f32":
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    try:
        # Not core.read_model: it tries a damaged file as every format that it knows, some of which print.
        frontend = ov.frontend.FrontEndManager().load_by_framework("onnx")
        model = frontend.convert(frontend.load(str(path)))
        if not model.outputs:  # an empty file is an empty model
            raise FormatError(f"{path}: it holds no model")
        return core.compile_model(model, "CPU", settings)
    except FAILED as error:
        raise FormatError(f"{path}: OpenVINO cannot load it: {_why(error)}") from error


def _why(error: Exception) -> str:
    """The error's text without the places in OpenVINO's sources that it begins with."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    places = ("Exception from ", "Check '", "FrontEnd API failed with ")
    text = " ".join(line for line in lines if line and not line.startswith(places))
    return text[:300].rstrip(".") or type(error).__name__


def _operator(name: str, ms: float, about: Any, names: Names) -> Operator:
    op, precision, parts = (
        about[key].astype(str) for key in ("layerType", "runtimePrecision", "originalLayersNames")
    )
    ours = [found for part in parts.split(",") if part and (found := names.find(part, op))]
    # A conversion that stays becomes a subtraction and a product.
    computes = [item for item in ours if names.op[item] not in QUANTIZES]
    converts = op in CONVERTS or (bool(ours) and not computes)
    integer = precision.startswith(("i", "u", "bool")) and not converts
    return Operator((computes or ours or [name])[0], op, integer, ms, converts)
