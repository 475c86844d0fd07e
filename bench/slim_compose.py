"""Slim compose: slim before and after other steps; the file on disk beside that of the same steps without it.

8 bits   slim, quantize, entropy              quantize without training
tables   slim, factorize, cluster, entropy    the last two trained for an epoch
sparse   98 % sparse (bench/fold.py), fold, slim, cluster, entropy    slim cuts units whose weights are masked
Each file is read back into a new network. Its score has to be the one that `measure` put into the ledger, and
its outputs those of the model in memory, bit for bit. Accuracies are compared in pairs, image by image: at
most 0 at the low end of the interval says that slim costs no accuracy that these images show.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fold import pruned
from job import lost, main, read_back
from networks import load, percent, task
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.model.task import Task
from tersor.steps import Cluster, Entropy, Factorize, Fold, Measure, Quantize, Slim

TUNING: dict[str, Any] = {
    "lr": 0.02,
    "optimizer": "sgd",
    "schedule": "onecycle",
    "teacher_weight": 0.9,
    "bf16": True,
    "channels_last": True,
}
Start = Callable[[str, nn.Module, Task], nn.Module | State]


def given(name: str, net: nn.Module, on: Task) -> nn.Module:
    return net


@dataclass(frozen=True)
class Chain:
    """Steps before and after slim."""

    slim: Slim
    after: Sequence[Any]
    before: Sequence[Any] = ()
    start: Start = given

    def steps(self, slim: bool) -> list[Any]:
        return [*self.before, *([self.slim] if slim else []), *self.after, Entropy(), Measure()]


# Factors and tables with AdamW: the gradient of a table's entry is a sum over its weights, too much for SGD.
FACTORS = Factorize(keep=0.5, epochs=1, lr=1e-3, teacher_weight=0.9)
EIGHT = Chain(Slim(keep=0.5, epochs=8, **TUNING), [Quantize(bits=8)])
TABLES = Chain(EIGHT.slim, [FACTORS, Cluster(entries=16, epochs=1, lr=1e-4, teacher_weight=0.9)])
SPARSE = Chain(Slim(keep=0.5, epochs=4, **TUNING), [Cluster(entries=32)], [Fold()], pruned)
CHAINS: dict[str, dict[str, Chain]] = {
    "lenet300": {"8 bits": EIGHT, "tables": TABLES, "sparse": SPARSE},
    "resnet20": {"8 bits": replace(EIGHT, slim=Slim(keep=0.5, epochs=1, **TUNING))},
}


@dataclass(frozen=True)
class Outcome:
    """One file, read back."""

    nbytes: int
    scores: Tensor  # [N], 0 or 1
    seconds: float  # of processor time
    apart: float  # the reported score and that of the file, in points
    differs: float  # the largest difference of outputs between the model in memory and in the file


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task()
    first = on.scores(net)
    for word, chain in CHAINS[name].items():
        start = chain.start(name, net, on)
        without, with_slim = (outcome(name, start, chain.steps(slim), on) for slim in (False, True))
        for label, found in {"without slim": without, "with slim": with_slim}.items():
            _, note = lost(first, found.scores)
            note += f"; {found.seconds:.0f} s"
            yield row(name, f"{word}, {label}, accuracy", percent(found.scores), "%", note=note)
            yield row(name, f"{word}, {label}, file", found.nbytes, "B")
            yield row(name, f"{word}, {label}, reported from read back", found.apart, "points", "<= 0")
            yield row(name, f"{word}, {label}, difference of outputs", found.differs, "", "<= 0")
        smaller = without.nbytes / with_slim.nbytes
        yield row(name, f"{word}, times smaller by slim", round(smaller, 2), "x", ">= 1.01")
        fall, note = lost(without.scores, with_slim.scores)
        yield row(name, f"{word}, drop by slim, at least", round(fall.low, 2), "points", "<= 0", note=note)


def outcome(name: str, start: nn.Module | State, steps: Sequence[Any], on: Task) -> Outcome:
    began = time.process_time()
    result = run(start, steps, on)
    seconds = time.process_time() - began
    model, nbytes = read_back(result, name)
    scores = on.scores(model)
    return Outcome(
        nbytes, scores, seconds, abs(reported(result) - percent(scores)), differs(result, model, on)
    )


def reported(result: State) -> float:
    """The accuracy in percent that `measure` noted."""
    (note,) = result.ledger.notes("accuracy", first=-1)
    value, *_ = note.data["after"]
    return round(100 * value, 2)


@torch.no_grad()
def differs(result: State, model: nn.Module, on: Task) -> float:
    x = next(iter(on.batches("evaluate")))[0]
    return float((result.model().eval()(x) - model(x)).abs().max())


def row(subject: str, what: str, value: float, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("slim_compose", subject, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, tuple(CHAINS)))
