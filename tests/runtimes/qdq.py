"""Q/DQ models made by hand with onnx.helper."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE = (3, 9, 7)  # of an input: channels, height, width
WIDTH = 16  # channels inside: a whole block of the kernels


class Graph:
    """Nodes in order, and their constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.draws = np.random.default_rng(0)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def rounded(self, x: str, name: str, scale: float, zero: int) -> str:
        """A pair of Q and DQ with uint8 codes."""
        parts = {"scale": np.float32(scale), "zero": np.uint8(zero)}
        grid = [self.constant(f"{name}_{word}", value) for word, value in parts.items()]
        codes = self.add("QuantizeLinear", f"{name}/q", x, *grid)
        return self.add("DequantizeLinear", f"{name}/dq", codes, *grid)

    def conv(self, x: str, name: str, inputs: int, integers: bool) -> str:
        codes = self.draws.integers(-127, 128, (WIDTH, inputs, 3, 3)).astype(np.int8)
        scales = self.draws.uniform(1e-4, 1e-3, WIDTH).astype(np.float32)
        bias = self.constant(f"{name}_bias", self.draws.normal(size=WIDTH).astype(np.float32) / 8)
        if integers:
            parts = codes, scales, np.zeros(WIDTH, np.int8)
            names = [self.constant(f"{name}_{word}", part) for word, part in zip("wsz", parts, strict=True)]
            weight = self.add("DequantizeLinear", f"{name}/weight", *names, axis=0)
        else:
            weight = self.constant(f"{name}_w", codes * scales[:, None, None, None])
        return self.add("Conv", name, x, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def save(self, path: Path) -> Path:
        self.nodes[-1].output[0] = "out"
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", *SHAPE])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", WIDTH, *SHAPE[1:]])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def network(path: Path, integers: bool = True) -> Path:
    """first -> relu1 -> second, sum with the skip, softmax; all but the softmax between Q and DQ, or none."""
    graph = Graph()

    def rounded(x: str, name: str, scale: float, zero: int) -> str:
        return graph.rounded(x, name, scale, zero) if integers else x

    x = rounded("x", "input", 1 / 32, 128)
    y = graph.add("Relu", "relu1", graph.conv(x, "first", SHAPE[0], integers))
    y = rounded(y, "edge1", 1 / 64, 0)
    z = rounded(graph.conv(y, "second", WIDTH, integers), "edge2", 1 / 32, 100)
    z = rounded(graph.add("Add", "sum", y, z), "edge3", 1 / 32, 90)
    graph.add("Softmax", "softmax", z, axis=1)
    return graph.save(path)


def inputs(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, *SHAPE)).astype(np.float32)
