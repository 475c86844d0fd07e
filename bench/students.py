"""Students: networks of the zoo alone, and taught by one of another architecture for the same seconds.

python bench/students.py --teachers FOLDER [--seconds 240] [--seeds 2] [--record] [STUDENT ...]
FOLDER       TEACHER.safetensors: trained weights, such as those that bench/tables.py leaves
alone        the task's loss
logits       and the teacher's outputs: Hinton 2015
outputs, attention, relation     and its feature maps, by distill's feature_loss
Each arm trains for the same seconds of processor time, the teacher's passes included: the time of a step is
measured first, and sets the epochs; a training that took a tenth more or less is done again. First weights
and order of batches are the same for a seed.
gain = the metric taught - alone, in points, on the same 1,000 test scenes: of each seed with an interval that
is paired by scene, and the mean over seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import job
from safetensors.torch import load_file
from table import Row
from torch import nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.measure.accuracy import compared, estimated
from tersor.model.task import Task
from tersor.steps import Distill, Finetune
from tersor.zoo.architectures import entry, zoo_model
from tersor.zoo.scene_tasks import scene_task

FEATURE_LOSSES = ("outputs", "attention", "relation")
STEPS = 12, 60  # of the two trainings that show what a step costs
TRIES, NEAR = 3, 0.1


class Pair(NamedTuple):
    teacher: str
    features: str  # layers whose maps are matched
    logits: bool  # whether the two give outputs of one kind
    lr: float


PAIRS = {
    "mobilenet_v3_small": Pair(
        "resnet18", "features.3=layer2,features.8=layer3,features.11=layer4", logits=True, lr=2e-3
    ),
    "yolo_lite_mobilenet": Pair(
        "ssdlite", "fine=backbone.features.0,coarse=backbone.features.1", logits=False, lr=2e-3
    ),
    "deeplab_v3plus_small": Pair("deeplab_v3plus", "decoder.aspp", logits=True, lr=3e-3),
}


def measure(name: str, given: argparse.Namespace) -> Iterator[Row]:
    pair, on = PAIRS[name], scene_task(entry(name).task)
    for _ in on.batches("train"):  # composes the scenes, which are kept
        pass
    teacher = zoo_model(pair.teacher)
    teacher.load_state_dict(load_file(given.teachers / f"{pair.teacher}.safetensors"))
    teacher.eval()
    theirs = scene_task(entry(pair.teacher).task)
    taught_by = estimated(theirs.scores(teacher), theirs.scored).value
    yield row(name, "teacher", round(100 * taught_by, 1), "%", note=pair.teacher)
    gains: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        alone: Any = None
        for arm, step in arms(pair, teacher).items():
            epochs, net, spent = for_seconds(name, on, step, given.seconds, seed)
            scores = on.scores(net)
            alone = scores if alone is None else alone
            found = compared(alone, scores, on.scored)
            value, note = 100 * found["after"][0], f"{epochs:.2f} epochs, {spent:.0f} s"
            if scores is not alone:
                gain, high, low = (-points for points in found["drop"])
                gains.setdefault(arm, []).append(gain)
                note += f"; gain {gain:+.2f} ({low:+.2f} to {high:+.2f}) points"
            yield row(name, f"{arm}, seed {seed}", round(value, 1), "%", note=note)
    for arm, found_gains in gains.items():
        mean = sum(found_gains) / len(found_gains)
        note = ", ".join(f"{gain:+.2f}" for gain in found_gains)
        yield row(name, f"gain, {arm}", round(mean, 2), "points", note=f"by seed {note}")


def arms(pair: Pair, teacher: nn.Module) -> dict[str, Any]:
    """{arm: epochs -> its step}"""
    like: dict[str, Any] = {
        "lr": pair.lr, "schedule": "onecycle", "weight_decay": 0.02, "channels_last": True,
    }  # fmt: skip
    share = 0.5 if pair.logits else 0.0
    taught = partial(Distill, teacher=teacher, teacher_weight=share, **like)
    found: dict[str, Any] = {"alone": lambda epochs: Finetune(epochs=epochs, **like)}
    if pair.logits:
        found["logits"] = lambda epochs: taught(epochs=epochs)
    for kind in FEATURE_LOSSES:
        found[kind] = partial(
            lambda epochs, kind: taught(epochs=epochs, features=pair.features, feature_loss=kind), kind=kind
        )
    return found


def for_seconds(name: str, on: Task, step: Any, seconds: float, seed: int) -> tuple[float, nn.Module, float]:
    """(epochs, the trained network, its seconds): as near to these seconds as TRIES trainings come."""
    found = []
    epochs = affordable(name, on, step, seconds, seed)
    for _ in range(TRIES):
        begin = time.process_time()
        net = trained(name, on, step(epochs), seed).model().eval()
        found.append((epochs, net, time.process_time() - begin))
        if abs(found[-1][-1] / seconds - 1) <= NEAR:
            break
        epochs *= seconds / found[-1][-1]
    return min(found, key=lambda each: abs(each[-1] - seconds))


def affordable(name: str, on: Task, step: Any, seconds: float, seed: int) -> float:
    """The epochs that take these seconds."""
    steps, spent = len(on.train), []
    for count in STEPS:
        begin = time.process_time()
        trained(name, on, step(count / steps), seed)
        spent.append(time.process_time() - begin)
    each = (spent[1] - spent[0]) / (STEPS[1] - STEPS[0])
    return seconds / each / steps


def trained(name: str, on: Task, step: Finetune, seed: int) -> State:
    return run(zoo_model(name, seed), step, on, seed=seed)


def row(name: str, what: str, value: float, unit: str, *, note: str = "") -> Row:
    return Row("students", name, what, value, unit, note=note)


def main(argv: list[str] | None = None) -> int:
    mine = argparse.ArgumentParser(add_help=False)
    mine.add_argument("--teachers", type=Path, required=True, metavar="FOLDER", help="trained weights")
    mine.add_argument("--seconds", type=float, default=240.0, help="of processor time for each training")
    mine.add_argument("--seeds", type=int, default=2)
    given, _ = mine.parse_known_args(argv)
    return job.main(__doc__, partial(measure, given=given), tuple(PAIRS), argv, (mine,))


if __name__ == "__main__":
    sys.exit(main())
