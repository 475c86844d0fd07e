"""Measure and export: notes agree with the model; an exported file is run before it is accepted."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import MissingError, RefusedError, SettingError
from tersor.measure import latency
from tersor.model.task import Task
from tersor.record.events import Note
from tersor.runtimes import RUNTIMES
from tersor.runtimes.agree import Difference
from tersor.runtimes.written import Written
from tersor.steps import Entropy, Export, Measure, Prune, Quantize, Slim


def note(result: State, kind: str, site: str = "") -> Any:
    found = [entry for entry in result.ledger.notes(kind) if entry.site == site]
    assert len(found) == 1
    return found[0]


def test_accuracy_is_counted() -> None:
    t = tiny("conv")
    result = run(t.model, [Prune(keep=0.05), Measure()], t.task)
    hits = []
    for model in (t.model.eval(), result.model().eval()):
        with torch.no_grad():
            hits.append([int(model(x[None]).argmax()) == int(y) for xs, ys in t.task.batches("evaluate")
                         for x, y in zip(xs, ys, strict=True)])  # fmt: skip
    data = note(result, "accuracy").data
    assert data["n"] == len(hits[0]) == 20
    assert data["before"][0] == pytest.approx(np.mean(hits[0]))
    assert data["after"][0] == pytest.approx(np.mean(hits[1]))
    assert data["drop"][0] == pytest.approx(100 * (np.mean(hits[0]) - np.mean(hits[1])))
    for low, high in (data["before"][1:], data["after"][1:]):
        assert 0 <= low < high <= 1


def test_bytes_and_bits_are_those_of_the_forms() -> None:
    t = tiny("mlp")
    result = run(t.model, [Quantize(bits=4), Entropy(coder="huffman"), Measure()])
    before = sum(4 * value.numel() for value in t.model.state_dict().values())
    assert note(result, "nbytes").data == {"before": before, "after": result.nbytes}
    for name, site in result.sites.items():
        if site.is_weight:
            noted = note(result, "bits", name)
            assert noted.data["stored"] == 8 * result.forms[name].nbytes
            assert noted.data["bound"] <= noted.data["stored"]


def test_without_a_task_it_says_what_is_missing() -> None:
    result = run(tiny("mlp").model, Measure(latency=True))
    assert "accuracy and latency are not measured" in note(result, "skipped").text
    assert not list(result.ledger.notes("accuracy"))


def test_latency_is_timed_in_turn() -> None:
    t = tiny("mlp")
    data = note(run(t.model, [Prune(), Measure(latency=True, batch=2)], t.task), "latency").data
    for word in ("before", "after"):
        middle, low, high = data[word]
        assert 0 < low <= middle <= high < 1000
    assert data["ratio"][0] > 0
    assert data["batch"] == [2]


@pytest.mark.wide
def test_a_model_of_one_batch_size_is_exported_and_timed_at_that(tmp_path: Path) -> None:
    """Like models with shapes as constants in their code or in their exported graph."""

    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("mlp").model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(8, 5))

    t = tiny("mlp")
    task = Task(evaluate=[batch for batch in t.task.batches("evaluate") if len(batch[0]) == 8])
    with pytest.raises(RefusedError, match="give dynamic_batch=false"):
        run(Eight(), Export(), task, out=tmp_path)
    steps = [Prune(keep=0.3), Measure(latency=True, batch=8), Export(dynamic_batch=False)]
    result = run(Eight(), steps, task, out=tmp_path)
    assert note(result, "latency").data["batch"] == [8]
    assert (tmp_path / "model.onnx").exists()


class Runtime:
    """A runtime with a simulated clock: a model takes a millisecond for each hundredth of its weights that is
    not zero. It records its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, differs: Difference | None = None) -> None:
        self.now, self.differs = 0, differs
        self.written: dict[Path, float] = {}  # ms a call
        self.threads: list[int] = []
        self.names: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()
        for step in ("measure", "export"):
            monkeypatch.setattr(f"tersor.steps.{step}.runtime", self.named)
            monkeypatch.setattr(f"tersor.steps.{step}.check_runtime", lambda name, who: None)
        monkeypatch.setattr(latency, "perf_counter_ns", lambda: self.now)

    def named(self, name: str) -> "Runtime":
        self.names.append(name)
        return self

    def write(
        self, model: nn.Module, example: Any, path: Path, dynamic_batch: bool, dynamic_axes: Any = ()
    ) -> Written:
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
        self.written[path] = 100 * float((weights != 0).float().mean())
        return Written(path, 1, "0" * 64, (path.name,))

    def open(self, path: Path, threads: int = 1) -> Any:
        self.threads.append(threads)

        def call(*arrays: np.ndarray) -> None:
            self.now += round(1e6 * self.written[path])
            self.shapes |= {array.shape for array in arrays}

        return SimpleNamespace(run=call)

    def compare(self, model: nn.Module, path: Path, batches: Any) -> Difference | None:
        return self.differs


@pytest.mark.parametrize("batch", [2, 19])
def test_latency_is_that_of_the_given_model_over_that_of_the_compressed_one(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this number of samples a call, although the example has 8."""
    runtime, t = Runtime(monkeypatch), tiny("mlp")
    steps = [Prune(keep=0.25, per="global"), Measure(latency=True, threads=3, batch=batch)]
    noted = note(run(t.model, steps, t.task), "latency")
    assert noted.data["before"] == [pytest.approx(100)] * 3
    assert noted.data["after"] == [pytest.approx(25, abs=1)] * 3
    assert noted.data["ratio"] == [pytest.approx(4, abs=0.2)] * 3
    assert f"{70 / 18:.2f}x as fast" in noted.text  # 18 of 70 weights are left
    assert (noted.data["threads"], noted.data["batch"]) == ([3], [batch])
    assert runtime.threads == [3, 3]
    assert runtime.shapes == {(batch, 5)}


@pytest.mark.parametrize(("name", "title"), [("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_the_runtime_is_the_one_that_is_named(
    name: str, title: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runtime, t = Runtime(monkeypatch, Difference(0.0, 0.0, 0.0, None, 4)), tiny("mlp")
    steps = [Measure(latency=True, runtime=name), Export(to=name)]
    noted = note(run(t.model, steps, t.task, out=tmp_path), "latency")
    assert runtime.names == [name, name]
    assert noted.data["runtime"] == name
    assert f" ms in {title}, batch 1, 1.00x as fast" in noted.text


@pytest.mark.extra
def test_openvino_times_and_runs_the_compressed_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.importorskip("openvino")
    t = tiny("conv")
    steps = [Quantize(bits=4), Measure(latency=True, runtime="openvino"), Export(to="openvino")]
    result = run(t.model, steps, t.task, out=tmp_path)
    assert 0 < note(result, "latency").data["ratio"][0] < 100
    found = openvino_session(tmp_path / "model.onnx").run(t.x)[0]
    np.testing.assert_allclose(found, t.out(result.model()).numpy(), rtol=1e-3, atol=1e-4)
    assert note(result, "written").data["max_abs"] < 1e-4


def openvino_session(path: Path) -> Any:
    from tersor.runtimes import openvino

    return openvino.open(path)


def test_the_export_note_has_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Runtime(monkeypatch, Difference(max_abs=0.25, max_rel=0.5, rms_rel=0.1, agree=0.75, samples=4))
    t = tiny("mlp")
    noted = note(run(t.model, Export(), t.task, out=tmp_path), "written")
    assert (noted.data["max_abs"], noted.data["agree"]) == (0.25, 0.75)
    assert "differs from PyTorch by at most 0.25" in noted.text


def test_measuring_changes_nothing() -> None:
    t = tiny("conv")
    plain, measured = run(t.model, Prune(), t.task), run(t.model, [Prune(), Measure()], t.task)
    assert plain.digest == measured.digest
    assert not [entry for entry in measured.ledger.edits() if entry.step == 1]


@pytest.mark.sampled(model="mlp")
@pytest.mark.parametrize("model", ["mlp", "attention"])
def test_the_files_outputs_are_those_of_the_compressed_model(model: str, tmp_path: Path) -> None:
    t = tiny(model)
    result = run(t.model, [Quantize(bits=3), Export(path="net.onnx")], t.task, out=tmp_path)
    path = tmp_path / "net.onnx"
    noted = note(result, "written").data
    assert noted["nbytes"] == path.stat().st_size
    assert noted["path"] == "net.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = t.x[:count]
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, t.out(result.model())[:count].numpy(), rtol=1e-3, atol=1e-4)
    assert np.abs(found - t.out()[:3].numpy()).max() > 1e-3, "the given model would answer otherwise"


def test_an_earlier_file_stays_where_the_export_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("mlp")
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    bad = replace(t.task, example=(torch.zeros(2, 9),))
    with pytest.raises(Exception, match="Linear|shape|export"):
        run(t.model, Export(), bad, out=tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


BAD: list[tuple[type, dict[str, Any], str]] = [
    (Export, {"to": "onnxruntme"}, "did you mean 'onnxruntime'? Allowed: onnxruntime, openvino"),
    (
        Measure,
        {"latency": True, "runtime": "openvine"},
        "measure: runtime='openvine'; did you mean 'openvino'?",
    ),
    (Measure, {"runtime": "openvino"}, "runtime='openvino' has no effect if latency=False"),
    (Slim, {"of": "latency", "runtime": "openvino"}, "slim: runtime='openvino'; Allowed: onnxruntime"),
    (Export, {"path": ""}, "path='', but it is a file name inside the folder of results"),
    (Export, {"path": "../x.onnx"}, "path='../x.onnx'"),
    (Export, {"path": "/x.onnx"}, "path='/x.onnx'"),
    (Measure, {"threads": 0}, "threads=0"),
    (Measure, {"threads": 100_000, "latency": True}, "threads=100000, but it is a count: 1 to 1024"),
    (Slim, {"threads": 100_000, "of": "latency"}, "threads=100000, but it is a count: 1 to 1024"),
    (Measure, {"batch": 0}, "batch=0"),
]


@pytest.mark.parametrize(("kind", "settings", "says"), BAD, ids=str)
def test_bad_settings(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        kind(**settings)
    assert says in str(caught.value)


def test_notes_are_json() -> None:
    """Files and journals store notes."""
    import json

    t = tiny("mlp")
    result = run(t.model, [Prune(), Measure()], t.task)
    for entry in result.ledger.notes():
        assert json.loads(json.dumps(dict(entry.data))) == entry.data
    assert Note("", "x", "y").data == {}


@pytest.mark.parametrize(
    "make", [lambda name: Export(to=name), lambda name: Measure(latency=True, runtime=name)]
)
@pytest.mark.parametrize(
    ("name", "package"), [*(("onnxruntime", p) for p in RUNTIMES["onnxruntime"].packages), ("openvino",) * 2]
)
def test_a_missing_package_is_reported_before_anything_runs(
    make: Any, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingError, match=rf"needs the package {package}\..*pip install 'tersor\[{name}\]'"):
        make(name)
    Measure()  # without latency, it needs no runtime


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


def test_an_export_says_that_the_tasks_batches_have_other_sizes(tmp_path: Path) -> None:
    """A file of one length was written for padded batches of several, and nothing said so."""
    batches = [(torch.randint(0, 9, (4, size)), torch.arange(4) % 3) for size in (5, 7, 6)]
    varied = Task("tokens", evaluate=batches, calibrate=batches[:1])
    for axes in ("", "1"):
        result = run(Tokens(), Export(dynamic_axes=axes), varied, out=tmp_path)
        said = "vary (axis 1: 5, 6, 7): give dynamic_axes=1" in note(result, "written").text
        assert said == (axes == "")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (given,) = session.get_inputs()
        assert (given.shape[1] == 5) == (axes == "")  # what the words are about
    same = Task("tokens", evaluate=batches[:1])
    assert "vary" not in note(run(Tokens(), Export(), same, out=tmp_path), "written").text


def test_a_network_in_bfloat16_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """The advice was to fix the batch size: arrays have no bfloat16, whatever the batch."""
    model, x = nn.Linear(3, 4).bfloat16(), torch.randn(2, 3).bfloat16()
    with pytest.raises(
        RefusedError, match=r"bfloat16: give the model in float32, model\.float\(\)"
    ) as caught:
        run(model, Export(), Task("bf16", evaluate=[(x, torch.arange(2))]), out=tmp_path)
    assert "batch" not in str(caught.value)
