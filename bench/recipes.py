"""Recipes: size and drop of what one would try first, for the page docs/which.md.

resnet20, mobilenetv2   the recipes of RECIPES, each followed by entropy: file, and drop on all test images
1,000 training images calibrate. Nothing is chosen by the test images, and nothing is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from job import lost, main, read_back
from networks import load, task
from table import Row

from tersor.core.run import run
from tersor.steps import Entropy, Quantize, Rdoq

CALIBRATE = 1000
LEVELS = "2,3,4,6,8"
RECIPES = {
    "entropy": [],
    "quantize": [Quantize()],
    "quantize bits=4": [Quantize(bits=4)],
    "quantize bits=4 per=group": [Quantize(bits=4, per="group")],
    f"quantize allowed={LEVELS} mean_bits=4": [Quantize(allowed=LEVELS, mean_bits=4)],
    "rdoq bits=4": [Rdoq(bits=4)],
    "rdoq bits=4 weigh=none": [Rdoq(bits=4, weigh="none")],
    "rdoq bits=3": [Rdoq(bits=3)],
    "rdoq bits=2": [Rdoq(bits=2)],
}


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task(calibrate=CALIBRATE)
    before = on.scores(net)
    for words, steps in RECIPES.items():
        model, nbytes = read_back(run(net, [*steps, Entropy()], on), name)
        fall, note = lost(before, on.scores(model))
        yield Row("recipes", name, f"{words}, file", round(nbytes / 1000, 1), "kB")
        yield Row("recipes", name, f"{words}, drop", round(fall.amount, 2), "points", note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, ("resnet20", "mobilenetv2")))
