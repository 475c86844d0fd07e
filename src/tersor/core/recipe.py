"""Recipe: a list of steps, a seed and a format number, in Python or in words (steps/recipe_text.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tersor.core.step import Step
from tersor.errors import SettingError
from tersor.forms.form import DIGEST
from tersor.settings import settings_of

NUMBER = 1


@dataclass(frozen=True)
class Recipe:
    """Steps in order. In a lock file, `result` maps sites to digests: a run with another result is refused.
    `zeros`: the weights that keep the zeros that they were given with, as a glob, or "none"."""

    steps: tuple[Any, ...]
    seed: int | tuple[int, ...] = 0  # one for all steps, or one for each: a lock of several runs
    base: str | None = None
    result: tuple[tuple[str, str], ...] = ()
    zeros: str | tuple[str, ...] = "*"  # like the seed: one for all steps, or one for each

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        for number, step in enumerate(self.steps, 1):
            if isinstance(step, type) or not isinstance(step, Step):
                lacks = [key for key in ("name", "where", "needs", "run") if not hasattr(step, key)]
                raise SettingError(
                    f"recipe: step {number} is {step!r}, but it must be a step, such as Prune(keep=0.5)"
                    + (f": it has no {', '.join(lacks)}" if 0 < len(lacks) < 4 else "")
                )
        if not self.steps:
            raise SettingError("recipe: no steps. Name at least one, such as: prune keep=0.5")
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,) * len(self.steps)
        if len(seeds) != len(self.steps) or any(type(seed) is not int or seed < 0 for seed in seeds):
            raise SettingError(
                f"recipe: seed={self.seed!r}, but it must be a whole number, 0 or more, or one for each step"
            )
        zeros = self.zeros if isinstance(self.zeros, tuple) else (self.zeros,) * len(self.steps)
        if len(zeros) != len(self.steps) or not all(isinstance(glob, str) and glob for glob in zeros):
            raise SettingError(f"recipe: zeros={self.zeros!r}, but it is a glob such as '*', or 'none'")

    def seed_of(self, number: int) -> int:
        return self.seed[number] if isinstance(self.seed, tuple) else self.seed

    def zeros_of(self, number: int) -> str:
        return self.zeros[number] if isinstance(self.zeros, tuple) else self.zeros

    def to_json(self) -> dict[str, Any]:
        """Every setting spelled out, defaults too."""
        seed = list(self.seed) if isinstance(self.seed, tuple) else self.seed
        more = {} if self.zeros == "*" else {"zeros": list(z) if isinstance(z := self.zeros, tuple) else z}
        return {"tersor": NUMBER, "seed": seed, **more, "steps": list(self._settings)}

    @cached_property
    def _settings(self) -> tuple[dict[str, Any], ...]:
        return tuple({step.name: settings_of(step)} for step in self.steps)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:DIGEST]


def as_recipe(recipe: Recipe | Iterable[Any] | Any, seed: int = 0, zeros: str = "*") -> Recipe:
    """A Recipe from a Recipe (returned as it is), a step, or a list of steps."""
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe(tuple(recipe) if isinstance(recipe, (list, tuple)) else (recipe,), seed, zeros=zeros)
