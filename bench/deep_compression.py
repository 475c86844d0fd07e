"""Deep compression: prune, cluster and entropy-code two LeNets; the result is the file on disk.

ratio = bytes of the fp32 safetensors file / bytes of model.tersor, header and ledger included
Han, Mao, Dally 2016, with the recipe in bench/recipes/deep-compression.yaml. The accuracy is that of the
weights read back from the file, in a new network; seconds are those of the whole recipe and the writing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from job import lost, main, read_back
from networks import ROOT, load, percent, task, weights
from table import Row

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.steps import read_recipe

RECIPE = ROOT / "bench" / "recipes" / "deep-compression.yaml"
TARGETS = {"lenet300": (60, 89.43), "lenet5": (55, 91.67)}  # ratio; percent: 0.2 points below the given
SECONDS = 900
# Settings of pruning that differ from the recipe: the convolutions of LeNet-5 need a larger share of their
# weights than the later layers, which LAMP takes into account and one threshold for all does not.
PRUNE: dict[str, dict[str, Any]] = {"lenet5": {"per": "lamp", "keep": 0.055}}


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
    return replace(recipe, steps=(replace(prune, **PRUNE.get(name, {})), *others))


def row(name: str, what: str, value: float, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("deep_compression", name, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, tuple(TARGETS)))
