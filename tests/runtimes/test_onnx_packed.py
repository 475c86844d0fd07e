"""Packed weights: graphs by hand against a slow loop that unpacks, the operators that ONNX Runtime then runs,
and whole exports."""

import collections
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from present import present
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import SettingError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.packed_weights import PackedWeight, block_of, packed_weight
from tersor.model.task import Task
from tersor.runtimes import onnx_integers, onnx_packed
from tersor.steps import Cluster, Entropy, Export, Prune, Quantize

ROWS = 24
BITS, BLOCKS, WIDTHS = (2, 4, 8), (16, 32, 64, 256), (33, 64, 100, 256)


class Given:
    """A weight by its parts, and its numbers by a loop."""

    def __init__(self, bits: int, block: int, columns: int, symmetric: bool):
        draws = np.random.default_rng([bits, block, columns, symmetric])
        groups = -(-columns // block)
        self.codes = draws.integers(0, 2**bits, (ROWS, columns)).astype(np.uint8)
        self.codes[0, 0], self.codes[0, 1] = 0, 2**bits - 1
        self.scale = draws.uniform(0.5, 1, (ROWS, groups)).astype(np.float32)
        zero = draws.integers(0, 2**bits, (ROWS, groups)).astype(np.uint8)
        self.zero = np.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
        self.block, self.bits = block, bits
        self.w = np.zeros((ROWS, columns), np.float32)
        for o, i in itertools.product(range(ROWS), range(columns)):
            step = int(self.codes[o, i]) - int(self.zero[o, i // block])
            self.w[o, i] = np.float32(step) * self.scale[o, i // block]

    def model(self, readers: list[onnx.NodeProto], inputs: dict[str, list], outputs: list[str]) -> ir.Model:
        parts = {"codes_0": self.codes, "scale": self.scale, "zero": self.zero, "bias": BIAS}
        read = helper.make_node(
            "DequantizeLinear", ["codes_0", "scale", "zero"], ["w"], axis=1, block_size=self.block
        )
        kinds = {"i": TensorProto.INT64}
        graph = helper.make_graph(
            [read, *readers], "net",
            [helper.make_tensor_value_info(k, kinds.get(k, TensorProto.FLOAT), s) for k, s in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in parts.items()],
        )  # fmt: skip
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


BIAS = np.linspace(-1, 1, ROWS, dtype=np.float32)
TURNED = helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])
LAYER = [
    TURNED, helper.make_node("MatMul", ["x", "t"], ["y"]), helper.make_node("Add", ["bias", "y"], ["out"])
]  # fmt: skip
ROWS_READ = helper.make_node("Gather", ["w", "i"], ["rows"], axis=0)
INDEX = np.array([[3, 0, 23], [5, 5, 1]])


def ran(model: ir.Model, feed: dict[str, np.ndarray], tmp_path: Path) -> tuple[list[np.ndarray], Any]:
    """The outputs, and the operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    return session.run(None, feed), kinds


def pack(model: ir.Model, name: str) -> dict[str, str]:
    why = onnx_packed.pack(model, {"codes_0": name})
    onnx_integers.tidy(model)
    return why


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def nbytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_layers(bits: int, symmetric: bool, tmp_path: Path) -> None:
    for block, columns in itertools.product((*BLOCKS, 12), WIDTHS):
        given = Given(bits, block, columns, symmetric)
        model = given.model(LAYER, {"x": ["B", 3, columns]}, ["out"])
        why = pack(model, "fc.weight")
        x = np.random.default_rng(0).normal(size=(2, 3, columns)).astype(np.float32)
        (found,), kinds = ran(model, {"x": x}, tmp_path)
        assert near(found, x @ given.w.T + BIAS), (block, columns)
        if bits == 8 or block == 12:
            text = "8 bits have no kernel" if bits == 8 else "blocks of 12 inputs; kernels take 16, 32"
            assert text in why["fc.weight"]
            assert set(kinds) <= {"MatMul", "Add", "Transpose", "FusedMatMul"}  # decoded when it was loaded
        else:
            assert why == {"fc.weight": ""}
            assert kinds == {"MatMulNBits": 1}
            stored = np.ceil(columns / block) * (block / 2 + 4 + (0 if symmetric else 0.5)) + 1
            assert nbytes(model) <= ROWS * (stored + 4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_tables(bits: int, symmetric: bool, tmp_path: Path) -> None:
    for block, columns in itertools.product(BLOCKS, WIDTHS):
        given = Given(bits, block, columns, symmetric)
        model = given.model([ROWS_READ], {"i": ["B", "T"]}, ["rows"])
        assert pack(model, "e.weight") == {"e.weight": ""}
        (found,), kinds = ran(model, {"i": INDEX}, tmp_path)
        assert np.array_equal(found, given.w[INDEX]), (block, columns)
        assert kinds == {"GatherBlockQuantized": 1}
        kept = next(b for b in BITS if b >= bits and columns * b % 8 == 0)  # whole bytes in a row
        groups = -(-columns // block)
        assert nbytes(model) <= ROWS * (columns * kept / 8 + 5 * groups + 1) + 4 * ROWS


@pytest.mark.parametrize(("columns", "shared"), [(64, True), (80, False)])
def test_a_table_tied_to_a_layer_is_stored_once(columns: int, shared: bool, tmp_path: Path) -> None:
    given = Given(4, 32, columns, symmetric=False)
    model = given.model([ROWS_READ, *LAYER], {"i": ["B", "T"], "x": ["N", columns]}, ["rows", "out"])
    assert pack(model, "e.weight") == {"e.weight": ""}
    x = np.ones((1, columns), np.float32)
    (rows, out), kinds = ran(model, {"i": INDEX, "x": x}, tmp_path)
    assert np.array_equal(rows, given.w[INDEX])
    assert near(out, x @ given.w.T + BIAS)
    assert kinds == {"GatherBlockQuantized": 1, "MatMulNBits": 1}
    codes = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8]
    assert len(codes) == (2 if shared else 3), "codes and zero points, and codes of another shape"


def gemm(**settings: Any) -> list[onnx.NodeProto]:
    return [helper.make_node("Gemm", ["x", "w", "bias"], ["out"], transB=1, **settings)]


OTHERS: dict[str, tuple[list[onnx.NodeProto], str]] = {
    "gemm": (gemm(), ""),
    "factors": (gemm(alpha=0.5), "Gemm reads it, with factors or a transposed input"),
    "not turned": ([TURNED, helper.make_node("MatMul", ["t", "w"], ["out"])], "MatMul reads it"),
    "numbers": ([helper.make_node("Mul", ["w", "w"], ["out"])], "Mul reads it"),
    "its own output": ([helper.make_node("Identity", ["w"], ["out"])], "Identity reads it"),
    "a vector": ([TURNED, helper.make_node("MatMul", ["v", "t"], ["out"])], "its input may be a vector"),
    "columns": ([helper.make_node("Gather", ["w", "i"], ["out"], axis=1)], "Gather reads it"),
}  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", OTHERS)
def test_what_else_reads_a_weight(case: str, symmetric: bool, tmp_path: Path) -> None:
    readers, reason = OTHERS[case]
    given = Given(4, 16, 40, symmetric)
    sizes = {"x": ["B", 40], "v": [40], "i": ["B", "T"]}
    read = {name for node in readers for name in node.input} & sizes.keys()
    model = given.model(readers, {name: sizes[name] for name in read}, ["out"])
    x = np.random.default_rng(1).normal(size=(2, 40)).astype(np.float32)
    feed = {"x": x, "v": x[0], "i": INDEX}
    expected = {
        "gemm": x @ given.w.T + BIAS, "factors": x @ given.w.T / 2 + BIAS, "not turned": given.w.T @ given.w,
        "numbers": given.w * given.w, "its own output": given.w, "a vector": given.w @ x[0],
        "columns": given.w[:, INDEX],
    }[case]  # fmt: skip
    why = pack(model, "w")
    assert why == {"w": reason}
    (found,), kinds = ran(model, {name: feed[name] for name in read}, tmp_path)
    assert near(found, expected)
    assert not {"Cast", "Sub", "DequantizeLinear"} & set(kinds), "it is decoded when it is loaded"
    assert ("com.microsoft" in model.opset_imports) == (case == "gemm")
    half = -(-ROWS * 48 // 2) + ROWS * 3 * 4 + (ROWS * 3 * 4 if not symmetric else 4) + ROWS * 4 + 64
    assert nbytes(model) <= half


def test_equal_scales_are_stored_once_and_halves_in_float16(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    for scale, most in ((np.float32(0.3), 4), (np.float32(0.25), 2)):
        given = Given(4, 16, 96, symmetric=True)
        given.scale[:] = scale * np.arange(1, ROWS + 1, dtype=np.float32)[:, None]
        given.w = (given.codes.astype(np.float32) - 8) * given.scale[:, :1]
        model = given.model(LAYER, {"x": ["B", 96]}, ["out"])
        assert pack(model, "fc.weight") == {"fc.weight": ""}
        assert model.graph.initializers["fc.weight.scales"].const_value.nbytes == ROWS * most
        (found,), kinds = ran(model, {"x": x}, tmp_path)
        assert near(found, x @ given.w.T + BIAS)
        assert kinds == {"MatMulNBits": 1}, "expanded when it is loaded"


def grouped(sizes: list[int]) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@pytest.mark.parametrize(
    ("groups", "bits", "block"),
    [
        ([384], 4, 128),  # three whole blocks, not one of 512 that is filled up
        ([100], 4, 128),
        ([64] * 4, 4, 64),
        ([48] * 4, 4, 16),
        ([24] * 4, 4, 24),
        ([128, 128, 44], 4, 64),  # 128 would fill up 84 of the last group's columns
        ([16, 48, 32], 4, 16),  # the first group ends inside of a block of 32
        ([3] * 5, 4, None),
        ([1], 4, 16),
        ([5], 8, 16),
    ],
)
def test_blocks(groups: list[int], bits: int, block: int | None) -> None:
    assert block_of(grouped(groups), bits) == block


FORMS = {
    "groups": ({"bits": 4, "per": "group", "group": 32}, ""),
    "rows": ({"bits": 3, "symmetric": False}, ""),
    "eight bits": ({"bits": 8, "symmetric": False}, ""),
    "one scale": ({"bits": 2, "per": "tensor"}, ""),
    "tiny groups": ({"bits": 4, "per": "group", "group": 2}, "not adjacent blocks of 4 or more"),
    "nine bits": ({"bits": 9}, "its codes have 9 bits, more than 8"),
    "powers of two": ({"bits": 4, "scheme": "log"}, "its form is loggrid, not integers on a uniform grid"),
}


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("case", FORMS)
def test_forms_in_blocks(case: str, masks: bool) -> None:
    settings, why = FORMS[case]
    net = nn.Sequential(nn.Linear(70, 6), nn.ConvTranspose1d(6, 4, 5))
    with torch.no_grad():
        net[1].weight.normal_()
    state = run(net, [Prune(keep=0.6)] * masks + [Quantize(**settings), Entropy()])
    for name in ("0.weight", "1.weight"):
        found = packed_weight(state.forms[name])
        if why:
            assert isinstance(found, str)
            assert why in found
            continue
        assert isinstance(found, PackedWeight)
        assert torch.equal(found.decode(), state.forms[name].decode())
        assert int(found.codes.max()) < 2 ** settings["bits"]
    assert packed_weight(state.forms["0.weight"], torch.float16) == why or "it is float16, not float32"


class Net(nn.Module):
    """A table that is tied to the output, layers, a product with a parameter, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(50, 64), nn.Linear(64, 48)
        self.conv, self.mix = nn.Conv1d(48, 48, 3, padding=1), nn.Parameter(torch.randn(48, 32))
        self.back, self.head = nn.Linear(32, 64, bias=False), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.fc(self.embed(tokens)))
        return self.head(self.back(self.conv(x.mT).mT @ self.mix))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(0))


def made() -> tuple[nn.Module, Task]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net().eval()
    example = (tokens(2, 5),)
    return net, Task("tokens", evaluate=[(*example, torch.zeros(2))], example=example)


def exported(state: State, task: Task, folder: Path, **settings: Any) -> tuple[bytes, State]:
    done = run(state, [Export(dynamic_axes="1", **settings)], task, out=folder)
    return (folder / "model.onnx").read_bytes(), done


def notes(state: State, kind: str) -> list[Any]:
    return [note for note in state.ledger.notes() if note.kind == kind]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_whole_model(name: str, tmp_path: Path) -> None:
    runtime, (net, task) = present(name), made()
    state = run(net, [Quantize(bits=4, per="group", group=32)], task)
    packed, done = exported(state, task, tmp_path, to=name)
    plain, without = exported(state, task, tmp_path / "float", to=name, weights="float")
    floats = sum(p.numel() for p in net.parameters())
    assert len(packed) < 4 * floats * 0.27 + 15_000 < len(plain)
    (note,) = notes(done, "written")
    expected = ["embed.weight", "fc.weight", "back.weight", "mix"]
    assert sorted(note.data["packed"]) == sorted(expected)
    assert sorted(note.data["float"]) == ["conv.weight"]
    assert (
        "4 of 5 weights stay packed in the runtime; floats there: conv.weight (Reshape reads it)" in note.text
    )
    (note,) = notes(without, "written")
    assert "packed" not in note.data
    session, model = runtime.open(tmp_path / "model.onnx"), state.model()
    for batch, length in ((1, 1), (2, 5), (3, 17)):
        x = tokens(batch, length)
        with torch.no_grad():
            ours = model(x).numpy()
        assert near(session.run(x)[0], ours)
    ops = collections.Counter(item.op for item in runtime.operators(tmp_path / "model.onnx", tokens(2, 5)))
    if name == "onnxruntime":
        assert (ops["MatMulNBits"], ops["GatherBlockQuantized"]) == (4, 1)
        assert not ops["MatMul"] + ops["Gather"] + ops["Cast"] + ops["Sub"] + ops["DequantizeLinear"]


@pytest.mark.wide
def test_a_saved_model_gives_the_same_file(tmp_path: Path) -> None:
    net, task = made()
    quantized = Quantize(bits=4, symmetric=False, where="!back.*")
    state = run(net, [Prune(keep=0.5), quantized, Cluster(entries=8, where="back.*"), Entropy()], task)
    first, done = exported(state, task, tmp_path)
    save(state, tmp_path / "m.tersor")
    again, _ = exported(load(tmp_path / "m.tersor").on(net), task, tmp_path / "again")
    assert first == again
    (note,) = notes(done, "written")
    assert note.data["float"]["back.weight"].startswith("its form is codebook, not integers on a")


def test_words_of_the_setting() -> None:
    with pytest.raises(SettingError, match="export: weights='pakced'.*packed"):
        Export(weights="pakced")
