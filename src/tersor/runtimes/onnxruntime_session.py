"""ONNX Runtime session: load an ONNX file, run it, and see which of its operators run in integers.

Without torch: see sessions.py. Cost of `operators`: a load and six runs, and a trace of some MB on disk.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as states

from tersor.errors import FormatError
from tersor.runtimes import sessions
from tersor.runtimes.operators import QUANTIZES, RUNS, Names, Operator, medians
from tersor.runtimes.sessions import Feed, brief, checked

BROKEN = (
    states.InvalidProtobuf,
    states.InvalidGraph,
    states.Fail,
    states.NotImplemented,
    states.RuntimeException,
    states.InvalidArgument,
)

# Kernels that multiply integers although they may read or give floats. Others are told by their types.
INTEGER = {
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulInteger16",
    "MatMulIntegerToFloat", "QAttention", "QGemm",
}  # fmt: skip
CONVERTS = {*QUANTIZES, "Cast", "ReorderInput", "ReorderOutput", "Shape", "Size"}
FLOATS = ("float", "double", "bfloat")


def open(path: str | Path, threads: int = 1) -> Session:
    """Load an ONNX file to run on `threads` CPU threads. FormatError if it is not an ONNX file."""
    path = checked(path, threads, "onnxruntime")
    return Session(_loaded(path, _options(threads)), path)


class Session(sessions.Session):
    """A file in ONNX Runtime."""

    broken = (*BROKEN, RuntimeError, ValueError)

    def __init__(self, session: ort.InferenceSession, path: Path):
        inputs, outputs = session.get_inputs(), session.get_outputs()
        first = inputs[0].shape[0] if inputs and inputs[0].shape else None
        batch = first if isinstance(first, int) else None  # a size that varies is a name, or None
        super().__init__(path, [item.name for item in inputs], [item.name for item in outputs], batch)
        self._session = session

    def call(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = self._session.run(None, feed)
        return found


def operators(path: str | Path, feed: Feed, threads: int = 1) -> list[Operator]:
    """What ONNX Runtime executes for these inputs, in order. Errors as `open` and `run`."""
    path, options = checked(path, threads, "onnxruntime"), _options(threads)
    arrays, named = feed
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = _loaded(path, options)
        try:
            for _ in range(RUNS + 1):
                Session(session, path).run(*arrays, **named)
        finally:
            trace = Path(session.end_profiling())
        events = json.loads(trace.read_bytes())
    nodes = [item for item in events if item.get("cat") == "Node" and "op_name" in item.get("args", {})]
    nodes.sort(key=lambda item: item["ts"])
    calls = [item for item in events if item.get("name") == "model_run"]
    calls.sort(key=lambda item: item["ts"])
    runs = []
    for call in calls[1:]:  # kernels are chosen and memory is taken in the first
        run: dict[str, float] = {}
        for node in nodes:
            if call["ts"] <= node["ts"] < call["ts"] + call["dur"]:
                run[_key(node)] = run.get(_key(node), 0.0) + node["dur"] / 1000  # us; loops run one often
        runs.append(run)
    names, about = Names(path), {_key(node): node for node in nodes}
    return [_operator(about[key], ms, names) for key, ms in medians(runs).items()]


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # errors are raised as exceptions; nothing else is printed
    return options


def _loaded(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (*BROKEN, states.NoSuchFile) as error:
        raise FormatError(f"{path}: ONNX Runtime cannot load it: {brief(error)}") from error


def _key(node: dict[str, Any]) -> str:
    return f"{node['name']} {node['args'].get('node_index')}"


def _operator(node: dict[str, Any], ms: float, names: Names) -> Operator:
    args, own = node["args"], node["name"].removesuffix("_kernel_time")
    op: str = args["op_name"]
    reads, gives = (
        [kind for item in args.get(f"{side}_type_shape", ()) for kind in item] for side in ("input", "output")
    )
    floats = any(kind.startswith(FLOATS) for kind in (*reads[:1], *gives))
    integer = op in INTEGER or op.startswith("QLinear") or (not floats and op not in CONVERTS)
    return Operator(names.find(own, op) or own or op, op, integer, ms, op in CONVERTS)
