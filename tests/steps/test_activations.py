"""quantize activations=8: what it changes, what it refuses, and that the result stays a state like others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_nets import NETS, made, note
from torch import nn

from tersor.check import check
from tersor.core.history import undo
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.errors import RefusedError, SettingError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.verify import verify
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import (
    Cluster,
    Distill,
    Entropy,
    Export,
    Factorize,
    Finetune,
    Fold,
    Measure,
    Penalize,
    Prune,
    Quantize,
    Rdoq,
)  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_batch_norms_are_folded_and_every_layer_computes_with_integers(name: str) -> None:
    net, task = made(name)
    result = run(net, [Quantize(activations=8)], task)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.plain().modules())
    weights = [site.name for site in result.sites.values() if site.is_weight]
    left = note(result).data["float"]
    assert note(result).data["layers"] == len(weights) - len(left)
    assert left.keys() == ({"pooler.weight"} if name == "columns" else set())
    x = task.example[0]
    exact, rounded = net(x), result.model()(x)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.05


def test_weights_that_are_integers_already_keep_their_codes() -> None:
    net, task = made("branches")
    four = run(net, [Rdoq(bits=4.0, vectors=False, per="channel")], task)
    result = run(four, [Quantize(activations=8)], task)
    for name, form in four.forms.items():
        if four.sites[name].is_weight:
            assert torch.equal(form.decode(), result.forms[name].decode())


def test_masks_stay_and_their_weights_are_integers() -> None:
    net, task = made("branches")
    result = run(net, [Prune(keep=0.3, per="tensor"), Quantize(activations=8)], task)
    assert note(result).data["float"] == {}
    for name, form in result.forms.items():
        if result.sites[name].is_weight:
            assert (form.decode() == 0).float().mean() >= 0.6


def test_a_layer_that_no_integers_fit_stays_in_float_and_is_named() -> None:
    net, task = made("branches")
    result = run(net, [Quantize(activations=8, where=("*", "!right.weight"))], task)
    assert result.forms["right.weight"].name == "dense"
    assert "right/conv2d:0" not in result.grids
    assert note(result).data["layers"] == 5


def test_the_result_is_saved_reloaded_coded_and_undone(tmp_path: Path) -> None:
    net, task = made("residual")
    result = run(net, [Quantize(activations=8), Entropy()], task)
    save(result, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor").model(made("residual")[0])
    x = task.example[0]
    assert torch.equal(again(x), result.model()(x))
    back = undo(result)
    assert torch.equal(back.model()(x), net(x))


def test_it_calibrates_again_after_other_steps() -> None:
    net, task = made("residual")
    once = run(net, [Quantize(activations=8)], task)
    twice = run(once, [Prune(keep=0.9), Quantize(activations=8)], task)
    assert not any(grid.stale for grid in twice.grids.values())
    assert set(twice.grids) == set(once.grids)
    twice.model()(task.example[0])


def test_layer_after_layer_is_as_good_as_all_at_once() -> None:
    """A second step changes what the first step's grids hold, so it finds their ranges again."""
    net, task = made("residual")
    net.norm = nn.Identity()
    x = task.example[0]
    steps = [Quantize(activations=8, where="head.weight"), Quantize(activations=8, where=("*", "!head*"))]
    parts, whole = run(net, steps, task), run(net, [Quantize(activations=8)], task)
    assert set(parts.grids) == set(whole.grids)
    assert note(parts).data["layers"] == 4
    assert torch.allclose(parts.model()(x), whole.model()(x), rtol=0, atol=1e-2 * float(net(x).std()))


def test_a_grid_whose_layer_is_no_integer_any_more_is_calibrated_too() -> None:
    net, task = made("residual")
    steps = [Quantize(activations=8), Factorize(keep=0.5, where="head.weight"), Quantize(activations=8)]
    result = run(net, steps, task)
    assert "factorize layers=true makes layers" in note(result).data["float"]["head.weight"]
    assert not any(grid.stale for grid in result.grids.values())
    x = task.example[0]
    plain = result.plain()(x)
    assert (result.model()(x) - plain).norm() < 0.05 * plain.norm()


def test_the_grid_of_a_norm_that_is_folded_later_goes_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )
    x = torch.randn(16, 3, 8, 8)
    task = Task(evaluate=[(x, torch.zeros(16, dtype=torch.int64))], calibrate=[(x,)], example=(x,))
    steps = [Quantize(activations=8, where=("*", "!0.weight")), Quantize(activations=8)]
    result = run(net, steps, task, journal=tmp_path / "journal")
    assert "1/batch_norm:0" not in result.grids
    assert 0 < (result.model()(x) - net.eval()(x)).norm() < 0.05 * net(x).norm()
    save(result, tmp_path / "m.tersor")
    assert all(check.sound for check in verify(tmp_path / "m.tersor"))
    assert torch.equal(load(tmp_path / "m.tersor").model(net)(x), result.model()(x))
    before = undo(result, steps=1, journal=tmp_path / "journal")
    assert "1/batch_norm:0" in before.grids
    assert before.digest == run(net, steps[:1], task).digest


def test_training_sees_the_grids() -> None:
    net, task = made("residual")
    settings: dict[str, Any] = {"activations": 8, "bits": 2, "epochs": 4, "lr": 1e-2}
    trained = run(net, [Quantize(**settings)], task)
    plain = Quantize(activations=8, bits=2, balance=False, correct=False)
    rounded = run(net, [plain], task)
    assert not any(grid.stale for grid in trained.grids.values())
    assert float(task.scores(trained.model()).mean()) > float(task.scores(rounded.model()).mean())


@pytest.mark.parametrize(
    "step",
    [
        Finetune(epochs=2, lr=1e-3), Distill(epochs=2), Prune(keep=0.5, epochs=2), Cluster(epochs=1),
        Penalize(epochs=2), Factorize(keep=0.5, epochs=1), Quantize(bits=4, epochs=1),
    ],
)  # fmt: skip
def test_steps_that_train_under_grids_keep_them(step: Any) -> None:
    net, task = made("residual")
    before = run(net, [Quantize(activations=8)], task)
    result = run(before, [step], task)
    assert not any(grid.stale for grid in result.grids.values())
    x = task.example[0]
    assert not torch.equal(result.model()(x), before.model()(x))


class Again(nn.Module):
    """Layers that are called several times, the second time on other values and with a float reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.GroupNorm(2, 6),
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = (x + self.conv(x)).relu()
        return self.head((x + self.conv(self.norm(x))).mean((2, 3)))


def test_a_layer_that_is_called_again_computes_with_integers_each_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Again(), torch.randn(16, 3, 8, 8)
    loader = TensorBatches(x, torch.zeros(16, dtype=torch.int64), batch=8)
    task = Task(evaluate=loader, calibrate=loader, train=loader, example=(x,))
    result = run(net, [Quantize(activations=8), Export()], task, out=tmp_path)
    assert note(result).data["layers"] == 3  # weights, not calls
    assert note(result).data["float"] == {}
    exact, rounded = net(x), result.model()(x)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.02
    file = torch.from_numpy(onnxruntime.open(tmp_path / "model.onnx").run(x)[0])
    assert (file - rounded).norm() < 0.5 * (exact - rounded).norm()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        fill = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
        scores = self.q(x) @ self.k(x).transpose(1, 2) + fill
        return self.head((scores @ x).softmax(2).mean(1))  # the mask itself is multiplied


def test_an_attention_mask_gets_no_grid() -> None:
    torch.manual_seed(0)
    net, x = Masked().eval(), torch.randint(11, (16, 5))
    loader = TensorBatches(x, torch.zeros(16, dtype=torch.int64), batch=8)
    task = Task(evaluate=loader, calibrate=loader, train=loader)
    result = run(net, [Quantize(activations=8, products="integer")], task)
    assert "/add:0" not in result.grids
    assert "/add:0" in note(result).data["refused"]
    assert "attention mask" in note(result).text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"activations": 4}, "8 or 16 bits, or 0"),
        ({"activations": 16, "activation_range": "dynamic"}, "8-bit codes alone"),
        ({"activations": 8, "bits": 9}, "bits=2 to 8"),
        ({"activations": 8, "scheme": "binary"}, "scheme=uniform"),
        ({"activations": 8, "symmetric": False}, "symmetric=true"),
        ({"activations": 8, "per": "group"}, "per=channel or tensor"),
        ({"activation_range": "mse"}, "has no effect"),
        ({"activations": 8, "activation_range": "widest"}, "activation_range"),
        ({"activations": 8, "activation_range": "percentile", "activation_percentile": 10.0}, "above 50"),
    ],
)
def test_settings_that_are_wrong_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Quantize(**settings)


def test_a_model_without_integer_layers_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8))
    x = torch.randint(11, (16, 5))
    loader = TensorBatches(x, torch.zeros(16, dtype=torch.int64), batch=8)
    with pytest.raises(RefusedError, match="no layer can compute with integers"):
        run(net, [Quantize(activations=8)], Task(evaluate=loader, calibrate=loader, train=loader))


def test_a_broken_calibration_batch_is_named_with_the_argument() -> None:
    net, task = made("branches")
    x = task.example[0].clone()
    x[1] = torch.nan
    with pytest.raises(RefusedError, match=r"/input:x: .*NaN.*Calibrate with other batches") as error:
        run(net, [Quantize(activations=8)], replace(task, calibrate=[task.example, (x,)]))
    assert "Leave this edge out" not in str(error.value)


def test_an_edge_of_zeros_alone_gets_no_grid() -> None:
    """Its range is unknown: a grid for it would make every other value 0."""
    net, task = made("branches")
    x = task.example[0]
    with torch.no_grad():
        net.right.weight.zero_()
        net.right.bias.zero_()
    result = run(net, [Quantize(activations=8)], task)
    why = "all its values are 0 in the calibration batches"
    assert note(result).data["refused"]["right/conv2d:0"] == why
    assert 0 < (net(x) - result.model()(x)).norm() / net(x).norm() < 0.05


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "mse", "entropy"])
def test_ranges_by_each_method(method: str) -> None:
    net, task = made("residual")
    result = run(net, [Fold(dead=False), Quantize(activations=8, activation_range=method)], task)
    x = task.example[0]
    assert 0 < (net(x) - result.model()(x)).norm() / net(x).norm() < 0.1


def test_a_dry_run_warns_of_later_steps_that_make_the_ranges_stale() -> None:
    def warned(*steps: Any) -> list[list[str]]:
        return [[warning["text"] for warning in facts["warnings"]] for facts in check(Recipe(steps))]

    rounded = Quantize(activations=8)
    first, *rest = warned(rounded, Prune(keep=0.5), Entropy(), Prune(keep=0.3))
    assert first == []
    assert rest[0] == ["makes the ranges of activations of step 1 quantize stale: put that step after it"]
    assert not any("stale" in text for text in (*rest[1], *rest[2]))
    assert not any(warned(Prune(keep=0.5), rounded, Finetune(epochs=1), Entropy(), Measure()))


@pytest.mark.parametrize("size", [1e-8, 1e-20, 1e-30])
def test_outputs_without_weights_that_read_tiny_values(size: float) -> None:
    """Their scale is the smallest there is, and times that of the edge it is 0 in float32."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ).eval()
    with torch.no_grad():
        net[0].weight.mul_(size)
        net[0].bias.mul_(size)
        net[2].weight[1:3] = 0
        net[2].bias[1] = 0
    x = torch.randn(16, 3, 4, 4)
    task = Task("t", calibrate=[(x[:8],), (x[8:],)], evaluate=[(x, torch.zeros(16).long())])
    found = run(net, [Quantize(activations=8)], task).model()
    with torch.no_grad():
        assert 0 < (net(x) - found(x)).norm() < 0.05 * net(x).norm()
