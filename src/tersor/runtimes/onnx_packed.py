"""ONNX packed: weights of a few bits as codes in the file, and in a runtime's memory where it has kernels.

MatMulNBits            com.microsoft; a linear layer of up to 4 bits, in blocks of its inputs
GatherBlockQuantized   com.microsoft; a table of up to 8 bits: only the rows that are read are decoded
Cast, Sub, Mul         any other weight: codes in the file, decoded once when a runtime loads it
Inputs stay float32 (accuracy_level 0), so that the file computes what the decoded weights do. 2 and 8 bits
have kernels only for rounded inputs: with float ones ONNX Runtime decodes them again in each call. So 2 bits
are stored as 4 for a linear layer, and 8 bits are decoded when the file is loaded.
The standard's own DequantizeLinear with 4-bit codes is not used: in each call ONNX Runtime either decodes the
weight again or rounds inputs to 8 bits. OpenVINO reads both and keeps 4 bits in memory for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tersor.runtimes.onnx_graphs import add_before, attribute, constant, given, initializer, replaced

DOMAIN = "com.microsoft"
KERNEL_BITS = 4  # of the kernel that multiplies float inputs with codes
SMALLEST = 16  # inputs in a block of a kernel


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight in rows: codes uint8 [O, I], scale float32 [O, G], zero uint8 [O, G]."""

    name: str
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    block: int

    @property
    def bits(self) -> int:
        """The fewest bits of 2, 4 and 8 that hold the codes and zero points."""
        top = max(int(self.codes.max()), int(self.zero.max()))
        return next(bits for bits in (2, 4, 8) if top < 2**bits)

    def symmetric(self, bits: int) -> np.ndarray | None:
        """The codes whose zero points are all 2^(bits - 1), which need not be stored. None if there are no
        such codes."""
        up = 2 ** (bits - 1) - int(self.zero.flat[0])
        moved = self.codes.astype(np.int16) + up
        if (self.zero != self.zero.flat[0]).any() or moved.min() < 0 or moved.max() >= 2**bits:
            return None
        return moved.astype(np.uint8)

    @property
    def fits(self) -> bool:
        """Whether kernels take blocks of this size."""
        return self.block >= SMALLEST and self.block & (self.block - 1) == 0


def pack(model: ir.Model, names: Mapping[str, str], openvino: bool = False) -> dict[str, str]:
    """Replace each DequantizeLinear of blocks by operators that keep or decode the codes. `names`: constant
    with codes -> weight. `openvino`: it must load the file too; it gathers rows of whole blocks only, and
    from a constant.

    Returns for each weight why it is decoded when the file is loaded; "" if it never is.
    """
    graph, why = model.graph, {}
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or not attribute(node, "block_size", 0):
            continue
        codes, scale, zero = (cast(np.ndarray, constant(value)) for value in node.inputs)
        name = names[str(given(node, 0).name)]
        weight = Codes(name, codes, scale, zero, attribute(node, "block_size", 0))
        why[weight.name] = Writer(graph, node, weight, openvino).write()
    if any(node.domain == DOMAIN for node in graph):
        model.opset_imports.setdefault(DOMAIN, 1)
    return why


class Writer:
    """Writes one weight for all operators that read it."""

    def __init__(self, graph: ir.Graph, node: ir.Node, weight: Codes, openvino: bool):
        self.graph, self.node, self.weight, self.openvino = graph, node, weight, openvino
        self.values: dict[str, ir.Value] = {}

    def write(self) -> str:
        why: list[str] = []
        out = self.node.outputs[0]
        for use in sorted(out.uses(), key=lambda use: use.node.op_type == "Gather"):  # see `table`
            reader, at = use.node, use.idx
            if reader.op_type == "Gather" and at == 0 and attribute(reader, "axis", 0) == 0:
                why.append(self.gather(reader))
            elif reader.op_type == "Gemm" and at == 1 and attribute(reader, "transB", 0):
                why.append(self.gemm(reader))
            elif reader.op_type == "Transpose" and not reader.outputs[0].is_graph_output():
                why += [
                    self.matmul(item.node)
                    if item.node.op_type == "MatMul" and item.idx == 1
                    else f"{item.node.op_type} reads it"
                    for item in list(reader.outputs[0].uses())
                ]
                if not reader.outputs[0].uses():
                    self.graph.remove(reader, safe=True)
            else:
                why.append(f"{reader.op_type} reads it")
        if out.uses() or out.is_graph_output():
            replaced(self.node, self.decoded())
        self.graph.remove(self.node, safe=True)
        return "; ".join(dict.fromkeys(filter(None, why)))

    def matmul(self, node: ir.Node, bias: ir.Value | None = None) -> str:
        """x W^T by the kernel, with the bias that is added next."""
        weight, x = self.weight, given(node, 0)
        if weight.bits > KERNEL_BITS:
            return f"{weight.bits} bits have no kernel for float inputs"
        if not weight.fits:
            return f"blocks of {weight.block} inputs; kernels take 16, 32, 64 and so on"
        if x.shape is None or len(x.shape) < 2:
            return "its input may be a vector"
        last = node
        if bias is None and node.op_type == "MatMul":
            bias, last = self.added(node)
        (rows, columns), bits = weight.codes.shape, KERNEL_BITS
        inputs: list[ir.Value | None] = [
            x,
            self.blocks(bits),
            self.scales(),
            self.zeros(bits),
            None,
            bias,
        ]
        while inputs[-1] is None:
            inputs.pop()
        made = ir.node(
            "MatMulNBits", inputs, domain=DOMAIN, name=node.name,
            attributes={"K": columns, "N": rows, "bits": bits, "block_size": weight.block},
        )  # fmt: skip
        self.graph.insert_before(last, made)
        replaced(last, made.outputs[0])
        self.graph.remove(last, safe=True)
        if last is not node:
            self.graph.remove(node, safe=True)
        return ""

    def gemm(self, node: ir.Node) -> str:
        plain = all(attribute(node, word, 1.0) == 1.0 for word in ("alpha", "beta"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if not plain or attribute(node, "transA", 0) or not self.is_bias(bias):
            return "Gemm reads it, with factors or a transposed input"
        return self.matmul(node, bias)

    def is_bias(self, value: ir.Value | None) -> bool:
        """Whether a value is one number for each output, or none."""
        return value is None or (
            constant(value) is not None and list(value.shape or ()) == [len(self.weight.codes)]
        )

    def added(self, node: ir.Node) -> tuple[ir.Value | None, ir.Node]:
        """The bias that is added to the output of a MatMul, and its Add; (None, node) if there is none."""
        out = node.outputs[0]
        uses = list(out.uses())
        if len(uses) == 1 and not out.is_graph_output() and uses[0].node.op_type == "Add":
            bias = uses[0].node.inputs[1 - uses[0].idx]
            if bias is not None and self.is_bias(bias):
                return bias, uses[0].node
        return None, node

    def gather(self, node: ir.Node) -> str:
        """The rows that are read, decoded."""
        weight, columns = self.weight, self.weight.codes.shape[1]
        if not weight.fits:
            return f"blocks of {weight.block} inputs; kernels take 16, 32, 64 and so on"
        bits = 4 if self.openvino or self.shares else 2
        bits = next(b for b in (bits, 4, 8) if b >= weight.bits and columns * b % 8 == 0)
        zero = self.zeros(bits)
        groups = weight.scale.shape[1]
        if self.openvino and columns % weight.block:
            return f"rows of {columns} are not whole blocks of {weight.block}"
        if self.openvino and zero is not None and groups * bits % 8:
            return f"the {groups} zero points of a row do not fill whole bytes"
        inputs = [
            self.table(bits),
            given(node, 1),
            self.scales(),
            *([zero] if zero is not None else ()),
        ]
        made = ir.node(
            "GatherBlockQuantized", inputs, domain=DOMAIN, name=node.name,
            attributes={"bits": bits, "block_size": weight.block, "gather_axis": 0, "quantize_axis": 1},
        )  # fmt: skip
        self.graph.insert_before(node, made)
        replaced(node, made.outputs[0])
        self.graph.remove(node, safe=True)
        return ""

    def decoded(self) -> ir.Value:
        """The weight [O, I] from its codes, by operators on constants, which a runtime applies once."""
        weight, (rows, columns) = self.weight, self.weight.codes.shape
        bits = max(KERNEL_BITS, weight.bits)
        tables = [weight.scale] if weight.symmetric(bits) is not None else [weight.scale, weight.zero]
        same = repeats(*tables)
        scale, zero = (table[:, ::same, None] for table in (weight.scale, weight.zero))
        groups, block = scale.shape[1], min(weight.block * same, columns)
        wide = np.pad(self.codes(bits), ((0, 0), (0, groups * block - columns)))
        kind = ml_dtypes.uint4 if bits == KERNEL_BITS else np.uint8
        value = self.constant("codes", wide.reshape(rows, groups, block).astype(kind))
        value = self.before("Cast", value, to=int(ir.DataType.FLOAT))
        if len(tables) == 1:
            zero = np.array(2 ** (bits - 1))
        value = self.before("Sub", value, self.constant("zero", zero.astype(np.float32)))
        value = self.before("Mul", value, self.constant("scale", scale))
        value = self.before("Reshape", value, self.constant("shape", np.array([rows, -1])))
        if wide.shape[1] > columns:
            ends = [
                self.constant(key, np.array([n])) for key, n in (("start", 0), ("end", columns), ("of", 1))
            ]
            value = self.before("Slice", value, *ends)
        return value

    def codes(self, bits: int) -> np.ndarray:
        """The codes, moved to the middle of this many bits if zero points need not be stored."""
        moved = self.weight.symmetric(bits)
        return self.weight.codes if moved is None else moved

    @property
    def shares(self) -> bool:
        """Whether a table shares the codes of a layer tied to it. OpenVINO takes no reshaped ones."""
        return "blocks" in self.values and not self.openvino

    def blocks(self, bits: int) -> ir.Value:
        """The codes as MatMulNBits takes them: uint8 [O, G, bytes of a block], the last block filled up."""
        weight, codes = self.weight, self.codes(bits)
        groups = weight.scale.shape[1]
        wide = np.pad(codes, ((0, 0), (0, groups * weight.block - codes.shape[1])))
        return self.constant("blocks", packed(wide.reshape(len(wide), groups, weight.block), bits))

    def table(self, bits: int) -> ir.Value:
        """The codes as GatherBlockQuantized takes them: uint8 [O, bytes of a row]. A layer that is tied to
        the table has the same bytes in another shape."""
        weight = self.weight
        if self.shares and weight.codes.shape[1] % weight.block == 0:
            shape = self.constant("table_shape", np.array([len(weight.codes), -1]))
            return self.before("Reshape", self.values["blocks"], shape)
        return self.constant("table", packed(self.codes(bits), bits))

    def scales(self) -> ir.Value:
        """The scales, float32 [O, G]. Equal ones of neighboring blocks are stored once, in float16 if that is
        exact: a runtime expands them once. OpenVINO takes only constants."""
        if "scales" in self.values:
            return self.values["scales"]
        scale, (rows, groups) = self.weight.scale, self.weight.scale.shape
        if self.openvino:
            return self.constant("scales", scale)
        same = repeats(scale)
        kept = scale[:, ::same]
        with np.errstate(over="ignore"):
            half = kept.astype(np.float16)
        exact = np.array_equal(half.astype(np.float32), kept)
        value = self.constant("scales", half if exact else kept)
        if exact:
            value = self.before("Cast", value, to=int(ir.DataType.FLOAT))
        if same > 1:
            for key, op, shape in (
                ("columns", "Reshape", (rows, -1, 1)),
                ("repeats", "Expand", (1, 1, same)),
                ("rows", "Reshape", (rows, groups)),
            ):
                value = self.before(op, value, self.constant(f"scales_{key}", np.array(shape)))
        self.values["scales"] = value
        return value

    def zeros(self, bits: int) -> ir.Value | None:
        """The zero points, packed; None if all are in the middle."""
        if self.weight.symmetric(bits) is not None:
            return None
        return self.constant("zeros", packed(self.weight.zero, bits))

    def constant(self, key: str, array: np.ndarray) -> ir.Value:
        if key not in self.values:
            self.values[key] = initializer(self.graph, f"{self.weight.name}.{key}", array)
        return self.values[key]

    def before(self, kind: str, *inputs: ir.Value, **settings: int) -> ir.Value:
        return add_before(self.graph, self.node, kind, list(inputs), **settings)


def repeats(*tables: np.ndarray) -> int:
    """How often each column of these tables [O, G] is there in a row: the largest such number."""
    groups = tables[0].shape[1]

    def fine(times: int) -> bool:
        return all(np.array_equal(one, one[:, ::times].repeat(times, axis=1)) for one in tables)

    return next(times for times in range(groups, 0, -1) if groups % times == 0 and fine(times))


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of so many bits along the last axis, in bytes: the first code in the lowest bits."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    share = 8 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % share)])
    parts = codes.reshape(*codes.shape[:-1], -1, share).astype(np.uint8)
    found: np.ndarray = np.bitwise_or.reduce(parts << (np.arange(share, dtype=np.uint8) * bits), axis=-1)
    return found
