"""Integer kernels: how many of a file's multiply-accumulates ONNX Runtime computes in integers.

The graph after the runtime's own fusions, and the shapes of one run of it. Without the last level, which
changes layouts and pads channels: it replaces no float product by an integer one.
conv      outputs * kernel * inputs / groups     transposed: inputs * kernel * outputs / groups
matmul    outputs * inner size                   recurrent: steps * batch * both matrices
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

CONVS = {
    "Conv": 1,
    "FusedConv": 1,
    "NhwcFusedConv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "ConvTranspose": 1,
    "QLinearConvTranspose": 3,
}  # fmt: skip  the input with the weight
PRODUCTS = {
    "MatMul", "FusedMatMul", "Gemm", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "MatMulNBits",
}  # fmt: skip
RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")


@dataclass(frozen=True)
class Product:
    """One operator that multiplies."""

    name: str
    op: str
    macs: float

    @property
    def integer(self) -> bool:
        return self.op.startswith(INTEGER)


def products(path: Path, feed: dict[str, np.ndarray]) -> list[Product]:
    """The operators of the optimized graph that multiply, for these inputs."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_bytes())
        graph = onnx.load(optimized).graph
    ran = {
        event["name"].removesuffix("_kernel_time"): event["args"]
        for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})
    }  # fmt: skip
    weights = {item.name: list(item.dims) for item in graph.initializer}
    found = []
    for node in graph.node:
        if (about := ran.get(node.name)) is not None and (macs := macs_of(node, about, weights)) is not None:
            found.append(Product(node.name, node.op_type, macs))
    return found


def macs_of(node: Any, about: dict[str, Any], weights: dict[str, list[int]]) -> float | None:
    """None for an operator that multiplies nothing. `about`: the profiler's words on a run of it."""
    reads = [next(iter(item.values())) for item in about["input_type_shape"]]
    gives = [next(iter(item.values())) for item in about["output_type_shape"]]
    # A kernel that packs its weight releases it, and shows no shape.
    reads = [weights.get(name, shape) for name, shape in zip(filter(None, node.input), reads, strict=False)]
    if node.op_type in CONVS:
        kernel = math.prod(reads[CONVS[node.op_type]][1:])
        return kernel * math.prod(reads[0] if "Transpose" in node.op_type else gives[0])
    if node.op_type in PRODUCTS:
        turned = any(item.name == "transA" and item.i for item in node.attribute)
        return math.prod(gives[0]) * (reads[0][-2] if turned else reads[0][-1])
    if node.op_type in RECURRENT:
        return math.prod(reads[0][:-1]) * (math.prod(reads[1]) + math.prod(reads[2]))
    if node.op_type == "Einsum":
        equation = next(item.s.decode() for item in node.attribute if item.name == "equation")
        words = equation.replace(" ", "").partition("->")[0].split(",")
        sizes = {letter: n for word, shape in zip(words, reads, strict=False)
                 for letter, n in zip(word, shape, strict=False)}  # fmt: skip
        return math.prod(sizes.values()) if len(words) > 1 else None
    return None
