"""bench/integers*.py: verdicts from the right times, parity on the outputs' grid, files as described."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from recurrent_nets import made

from tersor.core.run import run
from tersor.errors import TersorError
from tersor.measure.latency import Timing
from tersor.steps import Export, Quantize


def timing(*rounds):
    return Timing(float(np.median(rounds)), min(rounds), max(rounds), rounds, 1)


@pytest.fixture
def raced(bench):
    """Four files, four images of two classes. The fastest peer is NNCF's, which gets one more image wrong."""
    right, wrong = [[0.0, 1.0]], [[1.0, 0.0]]
    outputs = {
        "float": np.array(right * 3 + wrong),
        "float again": np.array(right * 3 + wrong),
        "ours": np.array(right * 4),
        "ort-minmax": np.array(right * 3 + wrong),
        "nncf-onnx-mixed": np.array(right * 2 + wrong * 2),
    }
    times = {
        "float": timing(4, 4, 8, 4, 4, 4),
        "float again": timing(4, 4, 8, 4, 4, 4.4),
        "ours": timing(2, 2, 4, 2.2, 2, 2),
        "ort-minmax": timing(3, 3, 6, 3, 3, 3),
        "nncf-onnx-mixed": timing(2, 2, 4, 2, 2, 2),
    }
    cell = ("ONNX Runtime", 1)
    return bench("integers_rows").Raced({"ONNX Runtime": outputs}, {cell: times}, {cell: 0.5})


LABELS = np.ones(4, dtype=np.int64)


def rows_of(rows):
    return {row.measure: row for row in rows}


def test_no_slower_is_the_end_of_the_interval_over_the_fastest_peer(bench, raced):
    limits = bench("integers_rows").Limits("", "", "<= 1.03")
    rows = rows_of(bench("integers_rows").speed_rows("net", raced, limits))
    verdict = rows["time over the fastest peer's, ONNX Runtime, batch 1, at most"]
    assert verdict.value == pytest.approx(1.1)  # the largest of six ratios, which end their 95 % interval
    assert (verdict.target, verdict.note.split(";")[0]) == ("<= 1.03", "nncf-onnx-mixed")
    assert rows["ours, speed, ONNX Runtime, batch 1"].value == 2.0
    assert rows["ort-minmax, speed, ONNX Runtime, batch 1"].value == pytest.approx(1.333)
    assert rows["A/A, ONNX Runtime, batch 1"].value == 1.0
    assert "1.000 to 1.100" in rows["A/A, ONNX Runtime, batch 1"].note
    assert not any(name.startswith("float") for name in rows)


def test_without_ours_there_is_no_verdict(bench, raced):
    del raced.times["ONNX Runtime", 1]["ours"]
    rows = rows_of(bench("integers_rows").speed_rows("net", raced, bench("integers_rows").Limits()))
    assert not any("fastest" in name for name in rows)


def test_a_drop_is_positive_if_accuracy_is_lost(bench, raced):
    limits = bench("integers_rows").Limits("", "<= 0.1")
    rows = rows_of(bench("integers_rows").accuracy_rows("net", raced, LABELS, limits))
    assert rows["float, accuracy, ONNX Runtime"].value == 75
    assert rows["ours, drop, ONNX Runtime"][3:6] == (pytest.approx(-25), "points", "<= 0.1")
    assert rows["nncf-onnx-mixed, accuracy, ONNX Runtime"].note.startswith("drop 25.00, 75.00 to 50.00 %")


def test_parity_counts_steps_of_the_grid(bench, raced):
    simulated = np.array([[0.0, 0.5], [1.0, 0.0], [0.0, 0.25], [0.0, 1.0]])
    raced.outputs["ONNX Runtime"]["ours"] = simulated + [[0, 0], [-0.25, 0.5], [1e-9, 0], [0, 0]]
    rows = rows_of(bench("integers_rows").parity_rows("net", simulated, raced))
    assert rows["outputs off by a step, ONNX Runtime"].value == 100 * 2 / 8
    assert rows["decisions as simulated, ONNX Runtime"].value == 100  # 0.75 beside 0.5
    largest = rows["largest difference from simulated, ONNX Runtime"]
    assert (largest.value, largest.note) == (0.5, "50 % of the largest output; 2 steps of the outputs' grid")


def test_floats_are_on_no_grid(bench):
    drawn = np.random.default_rng(0)
    step_of, floats = bench("integers_rows").step_of, drawn.standard_normal((100, 10))
    assert step_of(floats) == 0
    assert step_of(np.zeros((3, 2))) == 0
    assert step_of(np.rint(floats * 20) * 0.125) == 0.125


def test_a_file_is_compared_with_the_peers_files_without_traces(bench):
    peer, rows = bench("integers_peer"), bench("integers_rows")
    files = [
        peer.Made("ours", "", 90, 1.0, 0.0, 90),
        peer.Made("ort-minmax", "", 150, 1.0, 0.0, 100),
        peer.Made("nncf-openvino-mixed", "", 120, 1.0, 0.0),
    ]
    found = rows_of(rows.file_rows("net", 400, files, rows.Limits("<= 0.08")))
    assert found["file over the smallest peer's without traces"].value == pytest.approx(-10)
    assert (found["ours, file"].value, found["ours, file"].target) == (0.09, "<= 0.08")
    assert found["ort-minmax, file"].target == ""


def test_the_fastest_file_that_is_accurate_enough_counts(bench, raced):
    slim, cell = bench("integers_slim"), ("ONNX Runtime", 1)
    rows = rows_of(slim.best_rows("resnet20", raced, LABELS, {"ours"}, {"ort-minmax", "nncf-onnx-mixed"}))
    assert rows["peers, best speed, ONNX Runtime, batch 1"].note.startswith("ort-minmax;")  # NNCF's lost 25
    assert rows["ours, best speed, ONNX Runtime, batch 1"].target == slim.SPEED["resnet20"][cell]
    raced.outputs["ONNX Runtime"]["ours"] = np.array([[1.0, 0.0]] * 4)
    found = rows_of(slim.best_rows("resnet20", raced, LABELS, {"ours"}, set()))
    assert [row.value for row in found.values()] == [0.0]


def test_a_drop_of_exactly_the_limit_is_allowed(bench):
    right, wrong = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    outputs = {
        name: np.concatenate([right.repeat(1000 - count, 0), wrong.repeat(count, 0)])
        for name, count in {"float": 0, "a": 3, "b": 4}.items()
    }
    assert bench("integers_slim").accurate(outputs, np.ones(1000, dtype=np.int64)) == {"float", "a"}


def test_only_a_peers_file_may_fail(bench, monkeypatch, tmp_path, capsys):
    integers = bench("integers")
    np.save(tmp_path / "float.npy", np.zeros((2, 3)))
    lines = [
        {"runtime": "ONNX Runtime", "name": "float", "outputs": str(tmp_path / "float.npy")},
        {"runtime": "ONNX Runtime", "name": "ort-tensor", "failed": "no kernel"},
        {"runtime": "ONNX Runtime", "batch": 1, "load": 0.5, "times": {"float": [1.0, 3.0, 2.0]}},
        {"runtime": "OpenVINO", "missing": "not installed"},
    ]
    monkeypatch.setattr(integers, "replies", lambda *_: lines)
    found = integers.race("python", {}, tmp_path, tmp_path)
    assert found.outputs["ONNX Runtime"]["float"].shape == (2, 3)
    assert found.times["ONNX Runtime", 1]["float"].median_ms == 2
    assert capsys.readouterr().out == "ort-tensor in ONNX Runtime: no kernel\nOpenVINO: not installed\n"
    lines[1]["name"] = "ours"
    with pytest.raises(TersorError, match="ours does not run in ONNX Runtime: no kernel"):
        integers.race("python", {}, tmp_path, tmp_path)


def test_a_runtime_opens_the_float_file_twice_and_skips_what_it_cannot_read(bench, monkeypatch):
    runtimes = bench("integers_runtimes")

    def opening(path):
        if path == "bad.onnx":
            raise RuntimeError("bad")
        return lambda x: path

    monkeypatch.setitem(runtimes.RUNTIMES, "ONNX Runtime", opening)
    files = {"float": "f.onnx", "peer": "p.onnx", "broken": "bad.onnx", "other": "o.xml"}
    found = runtimes.opened("ONNX Runtime", files)
    assert found.pop("broken") == "RuntimeError: bad"
    assert {name: call(0) for name, call in found.items()} == {
        "float": "f.onnx", "float again": "f.onnx", "peer": "p.onnx",
    }  # fmt: skip


def test_outputs_are_kept_when_a_runtime_uses_its_buffer_again(bench):
    runtimes, buffer = bench("integers_runtimes"), np.zeros((100, 1))

    def call(x):
        buffer[: len(x)] = 2 * x
        return buffer[: len(x)]

    images = np.arange(250.0)[:, None]
    assert (runtimes.outputs(call, images) == 2 * images).all()


def test_a_child_answers_in_lines_of_json(bench):
    replies = bench("child").replies

    def child(code):
        return replies([sys.executable, "-c", code], 60)

    assert child("print('a word'); print('{\"a\": 1}')") == [{"a": 1}]
    assert child(f"raise SystemExit({bench('child').NOT_INSTALLED})") is None
    with pytest.raises(TersorError, match="(?s)ended with 1.*ZeroDivisionError"):
        child("1 / 0")
    with pytest.raises(TersorError, match="not done after 0.5 s"):
        replies([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)


def test_the_weights_of_an_openvino_file_count(bench, tmp_path):
    (tmp_path / "net.xml").write_bytes(b"12345")
    (tmp_path / "net.bin").write_bytes(b"1234567")
    (tmp_path / "net.onnx").write_bytes(b"123")
    assert bench("integers_peer").nbytes(tmp_path / "net.xml") == 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A convolution of four channels whose node carries a long trace, and eight images."""
    onnx, folder = pytest.importorskip("onnx"), tmp_path_factory.mktemp("tiny")
    pytest.importorskip("onnxruntime")
    drawn = np.random.default_rng(0)
    weights = {
        "w": drawn.standard_normal((4, 1, 3, 3)).astype(np.float32),
        "b": drawn.standard_normal(4).astype(np.float32),
    }
    node = onnx.helper.make_node("Conv", ["input", "w", "b"], ["logits"])
    node.metadata_props.add(key="trace", value="x" * 5000)
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("input", ["batch", 1, 8, 8]), ("logits", ["batch", 4, 6, 6]))
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph([node], "tiny", values[:1], values[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(folder / "tiny.onnx"))
    images = drawn.standard_normal((8, 1, 8, 8)).astype(np.float32)
    return SimpleNamespace(path=folder / "tiny.onnx", images=images, folder=folder)


@pytest.mark.parametrize(("method", "scales"), [("ort-minmax", 4), ("ort-percentile", 4), ("ort-tensor", 1)])
def test_the_peers_file_has_uint8_activations_and_int8_weights(bench, tiny, method, scales):
    import onnx
    import onnxruntime

    _, quantize = bench("integers_peer").METHODS[method]
    path = quantize(tiny.path, tiny.images, tiny.folder / method)
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    quantized = {name: array for name, array in tensors.items() if name.endswith("_quantized")}
    assert quantized["w_quantized"].dtype == np.int8
    assert tensors["w_scale"].size == scales
    assert {tensors[f"{name}_zero_point"].dtype.name for name in ("input", "logits")} == {"uint8"}
    ran = [
        onnxruntime.InferenceSession(str(file)).run(None, {"input": tiny.images})[0]
        for file in (tiny.path, path)
    ]
    span = ran[0].max() - ran[0].min()
    assert 0 < np.abs(ran[0] - ran[1]).max() < 0.05 * span


def test_traces_do_not_count_in_bare_bytes(bench, tiny):
    peer = bench("integers_peer")
    assert 0 < peer.bare(tiny.path) < tiny.path.stat().st_size - 5000
    assert peer.bare(tiny.folder / "net.xml") == 0


def test_divergence_is_that_of_the_class_probabilities(bench):
    imagenet, drawn = bench("imagenet_int8"), np.random.default_rng(0)
    p, q = drawn.standard_normal((2, 6, 10))
    found = imagenet.divergence(p, q)
    for k in range(6):
        a, b = (np.exp(x[k]) / np.exp(x[k]).sum() for x in (p, q))
        assert found[k] == pytest.approx((a * np.log(a / b)).sum())
    assert np.abs(imagenet.divergence(p, p)).max() < 1e-12


def test_our_divergence_is_judged_beside_the_best_peer_in_any_runtime(bench):
    imagenet = bench("imagenet_int8")
    given = np.array([[0.0, 1.0], [1.0, 0.0]])
    outputs = {
        "A": {"float": given, "ours": given * 1.1, "ort-minmax": given * 2, "nncf-onnx-mixed": given * 3},
        "B": {"float": given, "ours": given * 1.2, "nncf-onnx-mixed": given * 1.3},
    }
    rows = rows_of(imagenet.rows("net", outputs))
    worst, best = (imagenet.divergence(given, given * x).mean() for x in (1.3, 1.1))
    assert rows["KL over the best peer's"].value == pytest.approx(best / worst)
    assert rows["ours, KL, B"].value > rows["ours, KL, A"].value > 0
    assert "agreement 100.0 %" in rows["ort-minmax, KL, A"].note


@pytest.mark.parametrize("integer", [True, False])
def test_products_of_an_lstm_are_counted_step_by_step(bench, integer, tmp_path):
    net, task = made("states")
    steps = [Quantize(activations=8, activation_range="dynamic")] if integer else []
    run(net, [*steps, Export()], task, out=tmp_path)
    x = task.example[0].numpy()  # [4, 7, 6]
    found = bench("integers_kernels").products(tmp_path / "model.onnx", {"x": x})
    cells = [part for part in found if "LSTM" in part.op]
    assert [part.macs for part in cells] == [4 * 7 * 80 * (6 + 20), 4 * 7 * 80 * (20 + 20)]
    assert {part.integer for part in cells} == {integer}
    assert bench("integers_coverage").shares(found)[0] == (1 if integer else 0)
