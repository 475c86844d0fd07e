"""quantize activation_range=dynamic: no data, grids that do not become stale, training, refusals, files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recurrent_nets
import torch
from integer_nets import made, note
from torch import Tensor, nn

from tersor.check import check
from tersor.core.history import undo
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.errors import RefusedError, SettingError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.patch.diff import diff
from tersor.io.patch.patch import patch
from tersor.io.verify import verify
from tersor.maths.rounding import dynamic
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import (
    Cluster,
    Distill,
    Entropy,
    Export,
    Factorize,
    Finetune,
    Measure,
    Penalize,
    Prune,
    Quantize,
    Rdoq,
)  # fmt: skip

STEP = Quantize(activations=8, activation_range="dynamic")


def plain(name: str = "mlp") -> tuple[nn.Module, Task]:
    """A net, and a task without calibration batches."""
    net, task = made(name)
    return net, replace(task, calibrate=None)


def test_it_needs_no_data_and_rounds_what_each_layer_reads() -> None:
    """Against a slow forward of the same layers."""
    net, task = plain()
    result = run(net, [STEP], task)
    assert list(result.grids) == ["up/linear:0<0", "down/linear:0<0", "head/linear:0<0"]
    assert note(result).data["layers"] == 3
    assert "range of each batch" in note(result).text
    assert "no" not in result.forms["up.weight"].name
    weights = {name: form.decode() for name, form in result.forms.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(dynamic(x), weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    for x in (task.example[0], 30 * task.example[0][:2]):
        hidden = x + linear(nn.functional.gelu(linear(x, "up")), "down")
        assert torch.allclose(result.model()(x), linear(net.norm(hidden).mean(1), "head"), atol=1e-6)  # type: ignore[operator]


def test_a_task_without_calibration_batches_is_not_smoothed_and_a_note_says_so() -> None:
    net, task = made("mlp")
    with torch.no_grad():
        net.up.weight[:, 3] *= 0.02  # type: ignore[index, operator, union-attr]
    x = torch.randn(64, 6, 16)
    x[..., 3] *= 50  # an outlier
    task = Task(evaluate=[(x, torch.zeros(64, dtype=torch.int64))], calibrate=[(x,)], example=(x[:4],))
    with_data, without = run(net, [STEP], task), run(net, [STEP], replace(task, calibrate=None))
    assert "smoothed: that needs calibration batches" in note(without, "smoothed").text
    assert "up" in note(with_data, "smoothed").data["noise"]
    errors = [(result.model()(x) - net(x)).norm() for result in (with_data, without)]
    assert errors[0] < 0.7 * errors[1]
    off = run(net, [replace(STEP, smooth=False)], task)
    assert not list(off.ledger.notes("smoothed"))
    assert torch.equal(off.model()(x), without.model()(x))


def test_convolutions_stay_in_float_and_are_named() -> None:
    net, task = plain("branches")
    result = run(net, [STEP], task)
    assert set(result.grids) == {"fc1/linear:0<0", "fc2/linear:0<0"}
    assert note(result).data["float"] == dict.fromkeys(
        ("stem.weight", "left.weight", "right.weight", "last.weight"), "conv2d computes in float"
    )


def test_a_net_without_linear_layers_is_refused() -> None:
    net, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    task = Task(evaluate=[(x, torch.zeros(2, dtype=torch.int64))], example=(x,))
    with pytest.raises(RefusedError, match=r"weight: conv2d computes in float.*are for linear layers"):
        run(net, [STEP], task)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"activation_percentile": 99.0}, "99.0 has no effect if activation_range='dynamic'"),
        ({"activations": 0}, "activation_range='dynamic' has no effect if activations=0"),
        ({"per": "group"}, "per='group' with activations=8"),
        ({"symmetric": False}, "symmetric=False with activations=8"),
        ({"activation_range": "dynamical"}, "did you mean 'dynamic'"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Quantize(**({"activations": 8, "activation_range": "dynamic"} | settings))


@pytest.mark.parametrize("first", [STEP, Quantize(activations=8)])
def test_ranges_of_two_kinds_are_refused(first: Quantize) -> None:
    net, task = made("mlp")
    second = Quantize(activations=8) if first is STEP else STEP
    with pytest.raises(RefusedError, match=r"the range of .* is .* already, and all ranges are of one kind"):
        run(run(net, [first], task), [second], task)


def test_layer_after_layer_is_the_same_as_all_at_once() -> None:
    net, task = plain()
    steps = [replace(STEP, where="head.weight"), replace(STEP, where=("*", "!head*"))]
    parts, whole = run(net, steps, task), run(net, [STEP], task)
    x = task.example[0]
    assert torch.equal(parts.model()(x), whole.model()(x))
    again = run(whole, [STEP], task)  # nothing is left to do
    assert again.digest == whole.digest


@pytest.mark.parametrize(
    "step", [Prune(keep=0.5), Rdoq(bits=4.0, vectors=False, per="channel"), Quantize(bits=4)]
)
def test_later_changes_of_weights_leave_no_stale_range(step: Any, tmp_path: Path) -> None:
    net, task = plain()
    result = run(net, [STEP, step, Export()], task, out=tmp_path)
    assert not any(grid.stale for grid in result.grids.values())
    x = task.example[0]
    file = torch.from_numpy(onnxruntime.open(tmp_path / "model.onnx").run(x)[0])
    assert torch.allclose(result.model()(x), file, atol=1e-5)
    assert not torch.allclose(result.model()(x), net(x), atol=1e-3)


def test_a_layer_that_is_no_integer_any_more_is_named(tmp_path: Path) -> None:
    net, task = plain()
    steps = [STEP, Factorize(keep=0.5, where="up.weight"), replace(STEP, where="*"), Export()]
    result = run(net, steps, task, out=tmp_path)
    assert "it is a product" in note(result).data["float"]["up.weight"]
    assert "MatMul" in {item["op"] for item in note(result, "operators").data["float"]}


@pytest.mark.parametrize(
    "step",
    [
        Finetune(epochs=2, lr=1e-3), Distill(epochs=2), Prune(keep=0.5, epochs=2), Cluster(epochs=1),
        Penalize(epochs=2), Factorize(keep=0.5, epochs=1), Quantize(bits=4, epochs=1), STEP,
    ],
)  # fmt: skip
def test_steps_that_train_keep_the_grids(step: Any) -> None:
    net, task = plain()
    step = replace(step, epochs=1.0, bits=3) if step is STEP else step
    before = run(net, [STEP], task)
    result = run(before, [step], task)
    assert not any(grid.stale for grid in result.grids.values())
    x = task.example[0]
    assert (result.model()(x) - before.model()(x)).abs().max() > 0 or step.bits == 3


def test_training_sees_the_grids() -> None:
    net, task = plain()
    trained = run(net, [replace(STEP, bits=2, epochs=20, lr=1e-2)], task)
    rounded = run(net, [replace(STEP, bits=2)], task)
    assert float(task.scores(trained.model()).mean()) > float(task.scores(rounded.model()).mean())


def test_the_result_is_saved_reloaded_patched_and_undone(tmp_path: Path) -> None:
    net, task = plain()
    result = run(net, [STEP, Entropy()], task)
    save(result, tmp_path / "m.tersor")
    assert all(row.sound for row in verify(tmp_path / "m.tersor"))
    again = load(tmp_path / "m.tersor")
    x = task.example[0]
    assert again.digest == result.digest
    assert torch.equal(again.model(made("mlp")[0])(x), result.model()(x))
    assert torch.equal(undo(result).model()(x), net(x))
    save(run(net, [Entropy()], task), tmp_path / "old.tersor")
    diff(tmp_path / "old.tersor", tmp_path / "m.tersor", tmp_path / "p")
    patch(tmp_path / "old.tersor", tmp_path / "p", tmp_path / "new.tersor")
    assert (tmp_path / "new.tersor").read_bytes() == (tmp_path / "m.tersor").read_bytes()


def test_the_check_says_that_it_needs_no_data_and_does_not_warn_of_stale_ranges() -> None:
    net, _ = plain()
    facts = check(Recipe((STEP, Prune(keep=0.5), Measure())), net)
    assert facts[0]["needs"] == "a task with an example of the model's inputs; no data, except to smooth"
    assert not facts[1]["warnings"]
    static = check(Recipe((Quantize(activations=8), Prune(keep=0.5))), net)
    assert static[0]["needs"] == "a task"
    assert static[1]["warnings"]


# Recurrent layers


def recurrent() -> tuple[nn.Module, Task]:
    return recurrent_nets.made("outputs")


def test_an_lstm_rounds_what_its_matrices_multiply() -> None:
    net, task = recurrent()
    result = run(net, [STEP], task)
    assert list(result.grids) == ["cell/lstm:0.0<all", "head/linear:0<0"]
    assert note(result).data == {"layers": 9, "edges": 2, "float": {}, "refused": {}}
    x = task.example[0]
    apart = (result.model()(x) - net(x)).abs().max()
    weights = run(net, [Quantize()], task)
    assert 1e-4 < apart < 0.1 * net(x).abs().max()
    assert not torch.allclose(result.model()(x), weights.model()(x), atol=1e-5)
    rest = run(net, [replace(STEP, where=("*", "!cell.*"))], task)
    assert list(rest.grids) == ["head/linear:0<0"]
    some = run(net, [replace(STEP, where=("*", "!cell.weight_hh_l1"))], task)
    assert "not chosen" in note(some).data["float"]["cell.weight_ih_l0"]


def test_a_gru_stays_in_float_and_is_named() -> None:
    class Gru(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0].mean(1))

    result = run(Gru(), [STEP], recurrent()[1])
    assert set(result.grids) == {"head/linear:0<0"}
    names = ("cell.weight_ih_l0", "cell.weight_hh_l0")
    assert note(result).data["float"] == dict.fromkeys(names, "gru has no integer kernel")


def test_an_lstm_is_saved_reloaded_trained_and_undone(tmp_path: Path) -> None:
    net, task = recurrent()
    result = run(net, [STEP, Entropy(), Measure()], task)
    save(result, tmp_path / "m.tersor")
    assert all(row.sound for row in verify(tmp_path / "m.tersor"))
    again, x = load(tmp_path / "m.tersor"), task.example[0]
    assert again.digest == result.digest
    assert torch.equal(again.model(recurrent()[0])(x), result.model()(x))
    assert torch.equal(undo(result).model()(x), net(x))
    trained = run(result, [Finetune(epochs=3, lr=1e-2)], task)
    assert set(trained.grids) == set(result.grids)
    assert not any(grid.stale for grid in trained.grids.values())
    assert not torch.equal(trained.model()(x), result.model()(x))


def test_training_an_lstm_sees_its_rounding() -> None:
    net, task = recurrent()
    trained = run(net, [replace(STEP, bits=2, epochs=40, lr=1e-2)], task)
    rounded = run(net, [replace(STEP, bits=2)], task)
    assert float(task.scores(trained.model()).mean()) > float(task.scores(rounded.model()).mean())


def test_processors_without_vnni_are_not_simulated_for_an_lstm_and_it_is_named() -> None:
    net, task = recurrent()
    result = run(net, [STEP, Measure(saturate=True)], task)
    assert "not simulated: " in note(result, "saturation").text
    assert "cell.weight_ih_l0" in note(result, "saturation").data["left"]
