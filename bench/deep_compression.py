"""Deep compression: prune, cluster and entropy-code two LeNets; what counts is the file on disk.

ratio = bytes of the fp32 safetensors file / bytes of model.tersor, header and ledger included
Han, Mao, Dally 2016, with the recipe in bench/recipes/deep-compression.yaml. The accuracy is that of the
weights read back from the file, in a new network; seconds are those of the whole recipe and the writing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from job import lost, main, read_back
from networks import ROOT, load, percent, task, weights
from table import Row

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.steps import read_recipe

RECIPE = ROOT / "bench" / "recipes" / "deep-compression.yaml"
TARGETS = {"lenet300": (60, 89.43), "lenet5": (55, 91.67)}  # ratio; percent: 0.2 points below the given
SECONDS = 900
KEEP = {"lenet5": 0.06}  # where it is not the recipe's own: the target leaves LeNet-5 room for more weights


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task()
    ratio, least = TARGETS[name]
    began = time.perf_counter()
    result = run(net, recipe_for(name), on)
    model, nbytes = read_back(result, name)
    seconds = time.perf_counter() - began
    whole = weights(name).stat().st_size
    scores = on.scores(model)
    _, note = lost(on.scores(net), scores)
    yield row(name, "file", nbytes, "B", note=f"fp32 {whole} B")
    yield row(name, "times smaller than fp32", round(whole / nbytes, 2), "x", f">= {ratio}")
    yield row(name, "accuracy", percent(scores), "%", f">= {least}", note=note)
    yield row(name, "time", round(seconds), "s", f"<= {SECONDS}")


def recipe_for(name: str) -> Recipe:
    recipe = read_recipe(RECIPE)
    prune, *others = recipe.steps
    return replace(recipe, steps=(replace(prune, keep=KEEP.get(name, prune.keep)), *others))


def row(name: str, what: str, value: float, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("deep_compression", name, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, tuple(TARGETS)))
