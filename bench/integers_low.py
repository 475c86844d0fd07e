"""Integers low: weights of 4, 3 and 2 bits with 8-bit activations, and MiniLM at 4 bits. Nothing is trained.

nearest      `quantize bits=N activations=8`: one scale a channel, the range of its weights
gptq         the same with rounding=gptq: by the error of each layer's outputs, biases corrected
adaround     the same with rounding=adaround: each weight to a level beside it
brecq        the same with rounding=brecq: by the error of each block's outputs
rdoq         `fold, rdoq bits=2 per=channel vectors=false, quantize activations=8`: 2 bits on average
minilm       `quantize bits=4 per=group`, floats between the layers: mean cosine to fp32 on 500 held-out
             sentences; "encoder": without the table of words and the pooler
300 images, or 256 sentences, without labels, calibrate. Weights and grids are read back from the file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import minilm
from job import lost, main, read_back
from networks import load, percent, task
from table import Row

from tersor.core.run import run
from tersor.steps import Entropy, Fold, Quantize, Rdoq

BITS = (4, 3, 2)
# Largest drop, in points, by bits; nothing is asked for 3.
MOST = {"resnet20": {4: "<= 0.2", 2: "<= 3"}, "mobilenetv2": {4: "<= 0.2", 2: "<= 6"}}
SENTENCES = 256
ENCODER = ("encoder.*",)
COSINE = {"all layers": ("*", ">= 0.975"), "encoder": (ENCODER, ">= 0.991")}


def measure(name: str) -> Iterator[Row]:
    yield from sentence_encoder() if name == "minilm" else classifier(name)


def classifier(name: str) -> Iterator[Row]:
    net, on = load(name), task()
    given = on.scores(net)
    yield row(name, "fp32, accuracy", percent(given), "%")

    def drop(what: str, steps: list[Any], target: str = "") -> Row:
        began = time.perf_counter()
        result = run(net, [Fold(), *steps, Entropy()], on)
        seconds = time.perf_counter() - began
        model, nbytes = read_back(result, name)
        fall, note = lost(given, on.scores(model))
        note += f"; {nbytes / 1000:.1f} kB in {seconds:.0f} s"
        return row(name, f"{what}, drop", round(fall.amount, 2), "points", target, note)

    for bits in BITS:
        plain = Quantize(bits=bits, activations=8)
        yield drop(f"W{bits}A8, nearest", [plain])
        best = Quantize(bits=bits, activations=8, rounding="gptq")
        yield drop(f"W{bits}A8, gptq", [best], MOST[name].get(bits, ""))
        learned = Quantize(bits=bits, activations=8, rounding="adaround")
        yield drop(f"W{bits}A8, adaround", [learned])
        together = Quantize(bits=bits, activations=8, rounding="brecq")
        yield drop(f"W{bits}A8, brecq", [together])
    steps = [Rdoq(bits=2, per="channel", vectors=False), Quantize(activations=8)]
    yield drop("2 bits on average, A8, rdoq", steps)


def sentence_encoder() -> Iterator[Row]:
    net = minilm.load()
    on = minilm.task(net, SENTENCES)
    for what, (where, target) in COSINE.items():
        for rounding in ("nearest", "gptq"):
            began = time.perf_counter()
            result = run(net, [Quantize(bits=4, per="group", where=where, rounding=rounding)], on)
            seconds = time.perf_counter() - began
            scores = on.scores(result.model())
            note = f"lowest of {len(scores)} {float(scores.min()):.3f}; {seconds:.0f} s"
            wanted = target if rounding == "gptq" else ""
            title = f"4 bits, {what}, {rounding}, mean cosine"
            yield row("minilm", title, float(scores.mean()), "", wanted, note)


def row(subject: str, what: str, value: float, unit: str, target: str = "", note: str = "") -> Row:  # noqa: PLR0917
    return Row("integers_low", subject, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, (*MOST, "minilm")))
