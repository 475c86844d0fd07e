"""Shorten: ResNet-20 and MobileNetV2 without whole residual branches, at two points of measured time.

At 0.8 and 0.65 of the time in ONNX Runtime (shorten of=latency, nearest point): accuracy on all test images
before any tuning, with and without a refit of the layers after a branch on CALIBRATE images, no labels; MACs
of one image, counted by PyTorch; branches that went; time in ONNX Runtime on one thread, both networks in
turns. The scored weights are read back from the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from job import lost, main, read_back, speed
from networks import load, percent, task
from table import Row
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tersor.core.run import run
from tersor.steps import Measure, Shorten

CALIBRATE = 1000
POINTS = (0.8, 0.65)


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task(calibrate=CALIBRATE)
    image = next(iter(on.batches("evaluate")))[0][:1]
    given = on.scores(net)
    yield row(name, "fp32, accuracy", percent(given), "%")
    for keep in POINTS:
        at = f"asked {keep:g} of the time"
        for correct in (False, True):
            step = Shorten(keep=keep, of="latency", correct=correct, unmet="nearest")
            short = run(net, [step, Measure(latency=True)], on)
            model, _ = read_back(short, name)
            scores = on.scores(model)
            fall, note = lost(given, scores)
            how = "refitted" if correct else "cut alone"
            yield row(
                name, f"{at}, {how}, accuracy", percent(scores), "%", note=f"drop {fall.amount:.2f}; {note}"
            )
        gone = len(list(short.ledger.notes("removed")))
        yield row(name, f"{at}, branches removed", gone, "branches")
        share = 100 * macs(model, image) / macs(net, image)
        yield row(name, f"{at}, share of the MACs", round(share, 1), "%")
        times, note = speed(short)
        yield row(name, f"{at}, times as fast, ONNX Runtime, batch 1", round(times, 2), "x", note=note)


def macs(model: nn.Module, image: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() / 2


def row(name: str, what: str, value: float, unit: str, *, note: str = "") -> Row:
    return Row("shorten", name, what, value, unit, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, ("resnet20", "mobilenetv2")))
