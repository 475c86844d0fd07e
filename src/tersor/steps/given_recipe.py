"""Given recipe: whatever a caller gives as a recipe: a Recipe, steps, or the path of a recipe file.

core/run.py takes the first two; a path needs the table of steps, which is above it. `tersor.run` and
`tersor.pack` are the functions for callers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from tersor.core import run as core
from tersor.core.recipe import Recipe, as_recipe
from tersor.core.state import State
from tersor.errors import SettingError
from tersor.steps import STEPS, read_recipe

Given = Recipe | Iterable[Any] | Any
Run = TypeVar("Run", bound=Callable[..., State])


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


def taking_paths(call: Run) -> Run:
    """The same function; its recipe may also be the path of a recipe file."""

    @functools.wraps(call)
    def taking(model: Any, recipe: Given, *args: Any, seed: int = 0, **named: Any) -> State:
        return call(model, recipe_of(recipe, seed), *args, **named)

    return cast(Run, taking)


run = taking_paths(core.run)
