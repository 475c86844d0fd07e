"""Low rank: LeNet-300-100's two large layers at half their parameters, by plain and by whitened SVD.

Compared before fine-tuning, at the same rank: accuracy, and the squared error of the outputs, on the test
images. A quarter of the parameters shows the gap at a lower rank. Whitening uses the second moment of the
inputs of 3,000 training images. Fine-tuning is one epoch with the defaults of `finetune`. The scored weights
are read back from the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from job import lost, main, read_back
from networks import load, percent, task
from table import Row
from torch import nn

from tersor.core.run import run
from tersor.measure.accuracy import drop
from tersor.model.task import Task
from tersor.steps import Factorize, Finetune

LARGE = ("fc1.weight", "fc2.weight")
CALIBRATE = 3000


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task(calibrate=CALIBRATE)
    given = on.scores(net)
    yield row(name, "fp32, accuracy", percent(given), "%")
    for keep, word in ((0.5, "half"), (0.25, "a quarter")):
        ways, scores = {}, {}
        for whiten, way in ((False, "plain"), (True, "whitened")):
            cut = Factorize(keep=keep, per="tensor", whiten=whiten, where=LARGE)  # of the same ranks
            ways[way], _ = read_back(run(net, cut, on), name)
            scores[way] = on.scores(ways[way])
            yield row(name, f"{word}, {way}, not tuned, accuracy", percent(scores[way]), "%")
            yield row(name, f"{word}, {way}, not tuned, error of outputs", error(net, ways[way], on))
        fall = drop(scores["whitened"], scores["plain"])
        note = f"accuracy, whitened less plain, 95 % interval {fall.low:+.2f} to {fall.high:+.2f}"
        yield row(name, f"{word}, gain by whitening", round(fall.amount, 2), "points", ">= 0.01", note=note)
        less = error(net, ways["plain"], on) / error(net, ways["whitened"], on)
        yield row(name, f"{word}, error of outputs by whitening", less, "x smaller", ">= 1")
    tuned, _ = read_back(run(net, [Factorize(keep=0.5, where=LARGE), Finetune(epochs=1)], on), name)
    fall, note = lost(given, on.scores(tuned))
    yield row(name, "half, whitened, one epoch, drop", round(fall.amount, 2), "points", "<= 0.3", note=note)


def error(net: nn.Module, other: nn.Module, on: Task) -> float:
    """Mean squared difference of the outputs, over the mean square of the given network's outputs."""
    gap, whole = 0.0, 0.0
    with torch.no_grad():
        for batch in on.batches("evaluate"):
            given, found = on.run(net, batch), on.run(other, batch)
            gap += float((given - found).square().sum())
            whole += float(given.square().sum())
    return gap / whole


def row(name: str, what: str, value: float, unit: str = "", target: str = "", *, note: str = "") -> Row:
    return Row("lowrank", name, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, ("lenet300",)))
