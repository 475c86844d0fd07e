"""OpenVINO: what is asked of it beyond the contract of runtimes: precision, threads, no reports, silence."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import qdq
from onnx import TensorProto, helper
from present import present
from recurrent_nets import made
from test_onnxruntime import batch_of, built, plain, x
from torch import nn

from tersor.core.run import run
from tersor.errors import RefusedError, SettingError
from tersor.runtimes import onnxruntime
from tersor.runtimes.written import Written
from tersor.steps import Export, Quantize

pytestmark = pytest.mark.extra


@pytest.fixture(scope="module")
def openvino():
    return present("openvino")


@pytest.mark.parametrize("case", ["linear of width one", "attention", "language"])
def test_files_agree(openvino, case: str, tmp_path: Path) -> None:
    model, example = built(case)
    path = openvino.write(model, example, tmp_path / "m.onnx").path
    for n in (1, 3):
        inputs = batch_of(example, n)
        for a, b in zip(plain(model, inputs), openvino.open(path).run(*inputs), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(a).max())


def test_the_file_is_that_of_onnx_runtime(openvino, tmp_path: Path) -> None:
    model, example = built("conv")
    one = openvino.write(model, example, tmp_path / "one.onnx")
    assert one.sha256 == onnxruntime.write(model, example, tmp_path / "two.onnx").sha256


def test_weights_beside_the_file(openvino, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "ONE_FILE", 0)
    model = nn.Linear(64, 64)
    written = openvino.write(model, (x(2, 64),), tmp_path / "m.onnx")
    assert (
        sorted(item.name for item in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"] == sorted(written.files)
    )
    assert openvino.compare(model, written.path, [(x(5, 64),)]).max_rel < 1e-5


def test_float32_unless_bfloat16_is_named(openvino, tmp_path: Path) -> None:
    """bfloat16 has 8 bits of mantissa: its error is a thousand times that of float32."""
    path, array = qdq.network(tmp_path / "m.onnx", integers=False), qdq.inputs(2)
    exact = onnxruntime.open(path).run(array)[0]
    assert np.abs(openvino.open(path).run(array)[0] - exact).max() < 1e-6
    try:
        session = openvino.open(path, precision="bf16")
    except RefusedError as error:
        assert "precision='bf16', which this processor does not compute in" in str(error)  # noqa: PT017
        assert "avx512_bf16" not in Path("/proc/cpuinfo").read_text()
    else:
        assert 1e-5 < np.abs(session.run(array)[0] - exact).max() < 0.05
        ran = openvino.operators(path, x(2, *qdq.SHAPE), precision="bf16")
        assert not any(item.integer for item in ran)
    with pytest.raises(SettingError, match="openvino: precision='fp16'; .*Allowed: bf16, f32"):
        openvino.open(path, precision="fp16")


def test_settings_arrive(openvino, tmp_path: Path) -> None:
    path = qdq.network(tmp_path / "m.onnx")
    for threads in (1, 2):
        compiled = openvino.open(path, threads=threads)._request.get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
        assert compiled.get_property("NUM_STREAMS") == 1
        assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
        assert not compiled.get_property("ENABLE_CPU_PINNING")


def test_rounded_weights_do_not_round_inputs(openvino, tmp_path: Path) -> None:
    """By itself OpenVINO rounds the inputs of a linear layer whose weight is stored in 8 bits."""
    draws = np.random.default_rng(0)
    codes, scales = draws.integers(-127, 128, (256, 128)).astype(np.int8), np.full(128, 0.01, np.float32)
    constants = [onnx.numpy_helper.from_array(v, k) for k, v in (("w", codes), ("s", scales))]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    info = [
        helper.make_tensor_value_info(k, TensorProto.FLOAT, ["B", n]) for k, n in (("x", 256), ("y", 128))
    ]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], constants)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    array = draws.normal(size=(16, 256)).astype(np.float32)
    wanted = array @ (codes * scales)
    assert np.abs(openvino.open(path).run(array)[0] - wanted).max() < 1e-5 * np.abs(wanted).max()


def foreign(path: Path) -> None:
    """A file with an operator that no runtime has."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Foo", ["x"], ["y"], domain="bar")], "g", info[:1], info[1:])
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("bar", 1)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=8), path)


def test_an_operator_that_it_lacks(openvino, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"

    def write(model: Any, example: Any, path: Path, **settings: Any) -> Written:
        foreign(path)
        return Written(path, 1, "0" * 64, (path.name,))

    monkeypatch.setattr(onnxruntime, "write", write)
    says = "openvino: Linear runs in ONNX Runtime and not in OpenVINO: m.onnx: OpenVINO cannot load it: "
    with pytest.raises(RefusedError, match=f"^{says}.*bar.Foo"):
        openvino.write(nn.Linear(3, 3), (x(2, 3),), path)
    assert not list(tmp_path.iterdir())


CODE = """
import os, sys
import tersor.runtimes.onnxruntime
before = dict(os.environ), set(os.sched_getaffinity(0)), set(os.listdir(os.environ["HOME"]))
from tersor.runtimes import check_runtime, runtime
check_runtime("openvino", "test")
session = runtime("openvino").open(sys.argv[1])
import numpy
session.run(numpy.zeros((1, 3, 9, 7), numpy.float32))
assert before == (dict(os.environ), set(os.sched_getaffinity(0)), set(os.listdir(os.environ["HOME"])))
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
import openvino
openvino.convert_model
"""


def test_nothing_is_reported_printed_or_changed(openvino, tmp_path: Path) -> None:
    home, path = tmp_path / "home", qdq.network(tmp_path / "m.onnx")
    home.mkdir()
    env = {**os.environ, "HOME": str(home)}
    command = [sys.executable, "-c", CODE, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)


def test_an_lstm_that_rounds_is_refused(openvino, tmp_path: Path) -> None:
    """OpenVINO loads the operator and computes it in float: no error, and another result."""
    net, task = made("outputs")
    step = Quantize(activations=8, activation_range="dynamic")
    with pytest.raises(RefusedError, match=r"openvino: cell: its LSTM rounds .* where='\*,!cell\.\*'"):
        run(net, [step, Export(to="openvino")], task, out=tmp_path)
    assert not list(tmp_path.iterdir())
    apart = replace(step, where=("*", "!cell.*"))  # the way out
    result = run(net, [apart, Quantize(where="cell.weight*"), Export(to="openvino")], task, out=tmp_path)
    found = openvino.open(tmp_path / "model.onnx").run(task.example[0])[0]
    assert np.abs(found - result.model()(task.example[0]).detach().numpy()).max() < 1e-4  # type: ignore[operator]
