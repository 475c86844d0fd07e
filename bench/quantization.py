"""Quantization: accuracy lost with 8 bits, 4 bits and three values in all layers, first and last too.

int8      one scale a channel, nothing trained
4 bits    one scale a channel, trained through the grid for part of an epoch, half of the loss from the
          teacher
ternary   {-1, 0, 1} times one scale a channel, trained for some epochs
Biases and norms stay floats and are trained too. The settings are the same for all networks, except the
epochs, which depend on the time of a pass on two cores. The scored weights are read back from the file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from job import lost, main, read_back
from networks import NETWORKS, load, percent, task, weights
from table import Row

from tersor.core.run import run
from tersor.steps import Entropy, Quantize

# Passes over the 60,000 images that train 4 bits.
EPOCHS = {"lenet300": 1.0, "lenet5": 0.5, "resnet20": 0.1, "vgg": 0.1, "mobilenetv2": 0.1}
FOUR: dict[str, Any] = {"bits": 4, "lr": 1e-4, "teacher_weight": 0.5, "channels_last": True}
TERNARY: dict[str, Any] = {
    "scheme": "ternary",
    "epochs": 4.0,
    "lr": 1e-3,
    "teacher_weight": 0.5,
    "channels_last": True,
}


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task()
    given = on.scores(net)
    yield Row("quantization", name, "fp32, accuracy", percent(given), "%")

    def quantized(what: str, step: Quantize, target: str = "") -> Iterator[Row]:
        """The drop and the file's size, both for the weights that were read back."""
        began = time.perf_counter()
        result = run(net, [step, Entropy()], on)
        seconds = time.perf_counter() - began
        model, nbytes = read_back(result, name)
        fall, note = lost(given, on.scores(model))
        if step.epochs:
            note += f"; {step.epochs:g} epochs in {seconds:.0f} s"
        smaller = round(weights(name).stat().st_size / nbytes, 2)
        yield Row("quantization", name, f"{what}, drop", round(fall.amount, 2), "points", target, note=note)
        yield Row("quantization", name, f"{what}, file", smaller, "x smaller")

    yield from quantized("int8", Quantize(bits=8), "<= 0.1")
    yield from quantized("4 bits, not trained", Quantize(bits=4))
    yield from quantized("4 bits", Quantize(epochs=EPOCHS[name], **FOUR), "<= 0.5")
    if name == "lenet5":
        yield from quantized("ternary", Quantize(**TERNARY), "<= 1")


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, tuple(NETWORKS)))
