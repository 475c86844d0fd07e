"""The zoo: every architecture is built, trains a step, exports; its words name a model and a task."""

from pathlib import Path

import pytest
import torch
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from tersor.core.run import run
from tersor.errors import SettingError, TaskError
from tersor.resolve import task_of
from tersor.steps import Entropy, Export, Finetune, Measure, Quantize
from tersor.zoo.architectures import ZOO, zoo_model
from tersor.zoo.scene_tasks import METRICS, scene_task
from tersor.zoo.words import network_of

NEEDS = ("torchvision", "timm", "segmentation_models_pytorch", "skimage")


def whole() -> None:
    for name in NEEDS:
        pytest.importorskip(name)


@pytest.mark.extra
@pytest.mark.parametrize("name", ZOO)
def test_each_is_compressed_and_runs_as_integers(name: str, fashion_mnist: Path, tmp_path: Path) -> None:
    whole()
    task = scene_task(ZOO[name].task, fashion_mnist, train=16, test=4, calibrate=8, batch=8)
    net = zoo_model(name)
    steps = [Finetune(epochs=1), Quantize(activations=8), Entropy(), Export(path="m.onnx"), Measure()]
    result = run(net, steps, task, out=tmp_path)
    assert (tmp_path / "m.onnx").stat().st_size < 0.6 * 4 * sum(p.numel() for p in net.parameters())
    refused = [entry.text for entry in result.ledger.notes("refused")]
    assert all(text.startswith("norms: not kept") for text in refused), "they are folded by rounding then"
    images = next(iter(task.evaluate))[0]
    # As written, without fused kernels: these may round a sum to the next step, and each later layer of a
    # hardly trained network makes more of it. Export checks that they stay within the size of rounding.
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    (given,), wanted = inputs_of(tmp_path / "m.onnx"), result.model().eval()(images)
    found = InferenceSession(tmp_path / "m.onnx", options).run(None, {given: images.numpy()})
    for mine, theirs in zip(found, wanted if isinstance(wanted, tuple) else [wanted], strict=True):
        apart = (torch.from_numpy(mine) - theirs).abs()
        assert apart.mean() < 0.02 * theirs.abs().max()


def inputs_of(path: Path) -> list[str]:
    return [item.name for item in InferenceSession(path).get_inputs()]


@pytest.mark.extra
@pytest.mark.parametrize("kind", METRICS)
def test_the_tasks_give_what_they_say(kind: str, fashion_mnist: Path) -> None:
    whole()
    task = scene_task(kind, fashion_mnist, train=30, test=10, calibrate=6, batch=10)
    for images, target in (next(iter(task.train)), next(iter(task.evaluate)), next(iter(task.calibrate))):
        assert images.shape[1:] == (3, 96, 96)
        assert images.dtype == torch.float32
        if kind in {"boxes", "anchors"}:
            boxes, classes = target
            assert boxes.shape == (len(images), 3, 4)
            assert classes.shape == (len(images), 3)
        elif kind == "masks":
            assert target.shape == (len(images), 96, 96)
            assert target.max() <= 10
        else:
            assert target.shape == (len(images),)
    batches = len(scene_task(kind, fashion_mnist).train)  # none of them is composed yet
    assert batches == 30_000 // (8 if kind == "masks" else 24)
    again = scene_task(kind, fashion_mnist, train=30, test=10, calibrate=6, batch=10)
    assert again.fingerprint == task.fingerprint
    assert scene_task(kind, fashion_mnist, train=31, test=10, calibrate=6).fingerprint != task.fingerprint


@pytest.mark.extra
def test_words(fashion_mnist: Path) -> None:
    whole()
    assert type(network_of("zoo:yolo_lite")).__name__ == "YoloLite"
    assert type(network_of("timm:mobilenetv3_small_050")).__name__ == "MobileNetV3"
    assert task_of(f"zoo:yolo_lite:{fashion_mnist}").name == "scenes boxes"
    assert task_of(f"scenes:masks:{fashion_mnist}").name == "scenes masks"
    for text, error in (
        ("zoo:yolo", SettingError),
        ("scenes:box", TaskError),
        ("scenes:boxes:/no", TaskError),
    ):
        with pytest.raises(error):
            task_of(text)
    with pytest.raises(SettingError, match="timm has no 'resnet1'"):
        network_of("timm:resnet1")


def test_a_network_has_the_same_weights_each_time() -> None:
    """Else a run from the words zoo:NAME could not be resumed."""
    pytest.importorskip("torchvision")
    torch.manual_seed(3)
    first, state = zoo_model("yolo_lite").state_dict(), torch.get_rng_state()
    torch.manual_seed(4)
    again = zoo_model("yolo_lite").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"


def test_macs_are_those_of_a_slow_count() -> None:
    from tersor.report.zoo_table import macs

    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Flatten(),
        torch.nn.Linear(8 * 46 * 46, 5),
    )  # fmt: skip
    assert macs(net) == 27 * 8 * 48 * 48 + 9 * 8 * 46 * 46 + 8 * 46 * 46 * 5
