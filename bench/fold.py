"""Fold: 98 % sparse LeNets made smaller without any change of their outputs, and their speed.

sparse   gradual pruning to 2 % of the weights, one threshold for all layers, SGD with weight decay: weights
         that do not help shrink, and whole units lose all of theirs. Kept in the cache folder of codes.py
fold     dead units into biases, and out. Differences are those of outputs in float64 on test images and on
         noise, relative to the largest output; inputs that no unit reads stay and are counted apart
ms       ONNX Runtime, one thread, sparse and folded in turns: medians of the rounds, and of their ratios
Sparse files run as dense ones there: zeros take as long as other weights.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from codes import cache_folder
from job import lost, main
from networks import load, percent, task
from table import Row
from torch import Tensor, nn

import tersor
from tersor.core.run import run
from tersor.core.state import State
from tersor.measure.latency import interleave, ratio
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import Fold, Prune

PRUNE: dict[str, Any] = {
    "keep": 0.02,
    "per": "global",
    "ramp": 0.9,
    "lr": 3e-2,
    "optimizer": "sgd",
    "weight_decay": 3e-3,
}
EPOCHS = {"lenet300": 20.0, "lenet5": 8.0}
GONE = {"lenet300": ">= 55"}  # percent of all parameters
APART = "<= 1e-05"  # of the largest output
BATCHES = (1, 64)
ROUNDS = 40


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task()
    sparse = pruned(name, net, on)
    began = time.perf_counter()
    folded = run(sparse, [Fold()], on)
    seconds = time.perf_counter() - began
    before, after = sparse.model().eval(), folded.model().eval()
    given, scores = on.scores(net), on.scores(before)
    _, note = lost(given, scores)
    yield row(name, "98 % sparse, accuracy", percent(scores), "%", note=note)
    yield row(name, "folded, accuracy", percent(on.scores(after)), "%", note=f"folded in {seconds:.0f} s")
    for what, x in inputs(on).items():
        yield row(name, f"difference of outputs, {what}", apart(before, after, x), "", APART)
    (facts,) = (dict(entry.data) for entry in folded.ledger.notes("folded"))
    gone = 100 * (1 - facts["after"] / facts["before"])
    note = f"{facts['before']} to {facts['after']}; {facts['units']} units"
    yield row(name, "parameters gone", round(gone, 2), "%", GONE.get(name, ""), note=note)
    unread = [dict(entry.data) for entry in folded.ledger.notes("unread")]
    note = f"{sum(each['parameters'] for each in unread)} parameters, which stay"
    yield row(name, "inputs that no unit reads", sum(each["inputs"] for each in unread), "", note=note)
    yield from latency(name, before, after)


def pruned(name: str, net: nn.Module, on: Task) -> State:
    """The sparse network, trained once."""
    path = cache_folder() / f"fold-{name}.tersor"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft.tersor")
        tersor.save(run(net, [Prune(epochs=EPOCHS[name], **PRUNE)], on), draft)
        os.replace(draft, path)
    return tersor.load(path).on(net)


def inputs(on: Task) -> dict[str, Tensor]:
    images = torch.cat([batch[0] for batch in on.batches("evaluate")])
    return {"test images": images, "noise": 3 * torch.randn(1000, *images.shape[1:])}


@torch.no_grad()
def apart(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    """The largest difference of outputs in float64, relative to the largest output."""
    found = [
        torch.cat([wide(part) for part in x.double().split(500)])
        for wide in (each.double() for each in (before, after))
    ]
    before.float(), after.float()
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


def latency(name: str, before: nn.Module, after: nn.Module) -> Iterator[Row]:
    x = torch.randn(max(BATCHES), 1, 28, 28)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for word, model in {"sparse": before, "folded": after}.items():
            path = Path(folder) / f"{word}.onnx"
            onnxruntime.write(model, (x[:2],), path)
            sessions[word] = onnxruntime.open(path)
        for batch in BATCHES:
            array = x[:batch].numpy()
            runs = {word: partial(session.run, array) for word, session in sessions.items()}
            times = interleave(runs, rounds=ROUNDS)
            found = ratio(times["sparse"], times["folded"])
            for word, timing in times.items():
                note = f"95 % interval {timing.low:.3g} to {timing.high:.3g}"
                if word == "folded":
                    note += f"; {found.middle:.2f} x the speed, {found.low:.2f} to {found.high:.2f}"
                yield row(name, f"{word}, batch {batch}", timing.median_ms, "ms", note=note)


def row(name: str, what: str, value: float, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("fold", name, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, tuple(EPOCHS)))
