"""Given recipe: whatever a caller gives as a recipe: a Recipe, steps, or the path of a recipe file.

core/run.py takes the first two; a path needs the table of steps, which is above it. `tersor.run` and
`tersor.pack` are the functions for callers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core import run as core
from tersor.core.recipe import Recipe, as_recipe
from tersor.core.state import State
from tersor.errors import SettingError
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.steps import STEPS, read_recipe

Given = Recipe | Iterable[Any] | Any


def recipe_of(given: Given, seed: int = 0) -> Recipe:
    """The recipe that is given: a Recipe, a step, a list of steps, or the path of recipe.yaml or a lock file.
    `seed` is for steps; the other two have their own."""
    if not isinstance(given, str | os.PathLike):
        return as_recipe(given, seed)
    if isinstance(given, str) and not given.endswith((".yaml", ".yml")) and not os.path.isfile(given):
        word = next(iter(given.split()), "")
        step = STEPS.get(word, STEPS["prune"]).__name__
        raise SettingError(
            f"recipe: {given[:100]!r} is no file. A text is the path of a recipe file. Give steps as "
            f"objects: [tersor.{step}(), tersor.Entropy()]"
        )
    return read_recipe(Path(given))


def run(
    model: nn.Module | State, recipe: Given, task: Task | None = None, *,
    seed: int = 0, journal: str | Path | None = None, resume: bool = False,
    observer: Observer | None = None, out: str | Path = ".",
) -> State:  # fmt: skip
    """Compress a model by a recipe: a Recipe, a step, a list of steps, or the path of recipe.yaml.

    The given model is not changed. A state (from another run or a file) is continued: its ledger goes on, and
    results are compared with the model as it was first given. `task` gives batches, scores and a loss; steps
    that need none run without it. With `journal` (a folder) every applied group is kept on disk, and `resume`
    continues after the last one. Files that steps write (exports) go to `out`.
    """
    return core.run(
        model, recipe_of(recipe, seed), task, journal=journal, resume=resume, observer=observer, out=out
    )
