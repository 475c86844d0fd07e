"""A session as a module: fed by a task as the model is, its outputs found by place and by name."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.errors import FormatError, StorageError, TaskError
from tersor.model.outputs import changed, parts_of
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.runtimes.as_module import Outputs, SessionModule
from tersor.runtimes.onnx_files import files_of
from tersor.steps import Export, Quantize


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Inputs by name; a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {
            "hidden": (self.second(right), left - right), "logits": self.first(left), "nothing": None
        }  # fmt: skip


def session(model: nn.Module, example: Any, path: Path) -> SessionModule:
    onnxruntime.write(model, example, path)
    return SessionModule(onnxruntime.open(path), path.name)


def test_outputs_are_named_as_the_models(tmp_path: Path) -> None:
    model, inputs = Two(), {"left": x(4, 3), "right": x(4, 3) + 1}
    made = session(model, inputs, tmp_path / "m.onnx")
    with torch.no_grad():
        wanted, found = model(**inputs), made(**inputs)
    assert found.names == ("hidden.0", "hidden.1", "logits")
    assert torch.allclose(found["logits"], wanted["logits"], atol=1e-6)
    assert torch.allclose(found.logits, wanted["logits"], atol=1e-6)
    assert torch.allclose(found[2], wanted["logits"], atol=1e-6)
    for name, value in zip(("hidden.0", "hidden.1"), wanted["hidden"], strict=True):
        assert torch.allclose(found[name], value, atol=1e-6)
    with pytest.raises(KeyError, match="did you mean 'logits'"):
        found["logit"]
    with pytest.raises(AttributeError, match="did you mean 'logits'"):
        _ = found.logit


class Heads(nn.Module):
    """Two heads of one input, and the input's own sum: linear layers give the outputs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.body(x).relu()
        return {"logits": self.one(h), "states": (self.two(h), h)}


@pytest.mark.sampled(settings={"activations": 8})
@pytest.mark.parametrize(
    "settings", [{"bits": 4}, {"activations": 8}, {"activations": 8, "activation_range": "dynamic"}], ids=str
)
def test_outputs_that_a_kernel_makes_keep_the_models_names(settings: dict[str, Any], tmp_path: Path) -> None:
    task = Task("t", evaluate=[(x(8, 32), x(8, 4))], calibrate=[(x(8, 32),)])
    state = run(Heads(), [Quantize(**settings), Export()], task, out=str(tmp_path))
    wanted = state.model()(x(8, 32))
    found = SessionModule(onnxruntime.open(tmp_path / "model.onnx"), "model.onnx")(x(8, 32))
    assert found.names == ("logits", "states.0", "states.1")
    for name, value in zip(found.names, (wanted["logits"], *wanted["states"]), strict=True):
        assert torch.allclose(found[name], value, atol=0.05), name


class Nested(nn.Module):
    """Arguments with capitals, and containers of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 4)

    def forward(self, X: dict[str, Tensor], Mask_A: Tensor, pair: Any, unused: Any = None) -> Tensor:
        y: Tensor = self.layer(X["In"]) * Mask_A - pair[1] + 2 * pair[0]
        return y


@pytest.mark.sampled(settings={"bits": 4})
@pytest.mark.parametrize("settings", [{"bits": 4}, {"activations": 8}], ids=str)
def test_inputs_are_named_as_the_models_arguments(settings: dict[str, Any], tmp_path: Path) -> None:
    inputs = {
        "pair": (x(8, 4), x(8, 4) + 1), "Mask_A": x(8, 1) + 2, "X": {"In": x(8, 32)}, "unused": None
    }  # fmt: skip
    task = Task("t", evaluate=[{**inputs, "labels": x(8, 4)}], calibrate=[inputs])
    state = run(Nested(), [Quantize(**settings), Export()], task, out=str(tmp_path))
    made = SessionModule(onnxruntime.open(tmp_path / "model.onnx"), "model.onnx")
    assert sorted(made.session.inputs) == ["Mask_A", "X.In", "pair.0", "pair.1"]
    with torch.no_grad():
        assert torch.allclose(made(**inputs), state.model()(**inputs), atol=0.05)


def test_names_with_another_meaning_in_the_graph_are_not_taken(tmp_path: Path) -> None:
    class Clash(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x * 2, "y": x + 1}

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = x * 2
            return {"one": found, "other": found}

    for model, scale in ((Clash(), 2), (Twice(), 2)):
        made = session(model, (x(3, 2),), tmp_path / "m.onnx")
        assert np.allclose(made(x(3, 2))[0], scale * x(3, 2))
        assert made.session.inputs == ["x"]


def test_a_task_scores_a_file_as_it_scores_the_model(tmp_path: Path) -> None:
    """Tuples and dicts of inputs; a metric that reads an attribute, a key, a place, and the built-in one."""
    model, target = Two(), torch.arange(10) % 4
    rows = [{"left": x(5, 3), "right": x(5, 3) - 1, "labels": target[:5]},
            {"left": x(5, 3) * 2, "right": x(5, 3), "labels": target[5:]}]  # fmt: skip
    made = session(model, {k: v for k, v in rows[0].items() if k != "labels"}, tmp_path / "m.onnx")
    (tmp_path / "m.onnx").unlink()
    tuples = [(batch["left"], batch["right"], batch["labels"]) for batch in rows]

    def by_key(output: Any, target: Tensor) -> Tensor:
        return (output["logits"].argmax(1) == target).float()

    def by_attribute(output: Any, target: Tensor) -> Tensor:
        return (output.logits.argmax(1) == target).float()

    with torch.no_grad():
        hits = torch.cat([(model(b["left"], b["right"])["logits"].argmax(1) == b["labels"]).float()
                          for b in rows])  # fmt: skip
    for batches in (rows, tuples):
        for metric in ("accuracy", by_key, by_attribute):
            task = Task("two", evaluate=batches, metric=metric)
            assert torch.equal(task.scores(made), hits)


def test_one_output_is_a_tensor_and_wrong_inputs_are_named(tmp_path: Path) -> None:
    made = session(nn.Linear(3, 2), (x(2, 3),), tmp_path / "m.onnx")
    assert isinstance(made(x(5, 3)), Tensor)
    with pytest.raises(TaskError, match=r"float32 \[5, 4\].* exported with"):
        made(x(5, 4))
    with pytest.raises(TaskError, match=r"takes 1 inputs \(input\).*2 in order"):
        made(x(5, 3), x(5, 3))
    assert torch.equal(made(x(5, 3), None, scale=2.0), made(x(5, 3)))  # constants of the export


def test_outputs_that_are_no_tensors_are_refused() -> None:
    class Odd:
        inputs, outputs, batch = ["x"], ["label", "classes"], None

        def __init__(self, value: Any):
            self.value = value

        def run(self, *arrays: Any, **named: Any) -> list[Any]:
            return [np.zeros(2, np.float16), self.value]

    for value, says in ((np.array(["a", "b"]), "an array of <U1"), ([{0: 0.5}], "is list")):
        with pytest.raises(TaskError, match=f"'classes' is .*{says}|'classes' {says}"):
            SessionModule(Odd(value), "m.onnx")(x(2))
    found = SessionModule(Odd(np.zeros(2, np.int64)), "m.onnx")(x(2))
    assert [item.dtype for item in found] == [torch.float32, torch.int64]


def test_outputs_are_a_tuple() -> None:
    made = Outputs([x(2), x(3)], ["count", "b"])
    assert list(parts_of(made)) == [0, 1]
    assert torch.equal(made["count"], x(2))
    assert callable(made.count)
    for twin in (copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert twin.names == made.names
        assert torch.equal(twin.b, x(3))
    assert changed(made, lambda tensor: tensor) is made


def test_files_beside_a_file_are_its_own(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "m.onnx"
    onnxruntime.write(nn.Linear(300, 40), (x(2, 300),), path)
    assert files_of(path) == [path]
    model = onnx.load(path)
    onnx.save_model(
        model, tmp_path / "large.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1
    )
    assert files_of(tmp_path / "large.onnx") == [tmp_path / "large.onnx", tmp_path / "weights.bin"]
    assert (tmp_path / "weights.bin").stat().st_size >= 4 * 300 * 40
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(StorageError, match=r"weights.bin, which does not exist"):
        files_of(tmp_path / "large.onnx")
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(FormatError, match="not an ONNX file"):
        files_of(path)
    with pytest.raises(StorageError, match="cannot be read"):
        files_of(tmp_path / "none.onnx")
