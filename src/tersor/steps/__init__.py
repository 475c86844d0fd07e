"""The table of steps: one technique a file. The command line, YAML, tests and docs use this table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor.core.recipe import Recipe
from tersor.errors import StorageError
from tersor.steps.cluster import Cluster
from tersor.steps.distill import Distill
from tersor.steps.entropy import Entropy
from tersor.steps.export import Export
from tersor.steps.factorize import Factorize
from tersor.steps.finetune import Finetune
from tersor.steps.fold import Fold
from tersor.steps.measure import Measure
from tersor.steps.penalize import Penalize
from tersor.steps.prune import Prune
from tersor.steps.quantize import Quantize
from tersor.steps.rdoq import Rdoq
from tersor.steps.recipe_text import from_words, from_yaml
from tersor.steps.shorten import Shorten
from tersor.steps.slim import Slim

STEPS: dict[str, type[Any]] = {
    step.name: step
    for step in (
        Prune,
        Slim,
        Shorten,
        Fold,
        Quantize,
        Rdoq,
        Cluster,
        Factorize,
        Finetune,
        Distill,
        Penalize,
        Entropy,
        Measure,
        Export,
    )  # fmt: skip
}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file; a lock file is one too."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return from_yaml(text, STEPS, str(path))


def recipe_from_words(words: list[str], seed: int = 0) -> Recipe:
    """The recipe in words: ["prune", "keep=0.5", "entropy"]."""
    return from_words(words, STEPS, seed)


__all__ = [
    "STEPS", "Cluster", "Distill", "Entropy", "Export", "Factorize", "Finetune", "Fold", "Measure",
    "Penalize", "Prune", "Quantize", "Rdoq", "Shorten", "Slim", "read_recipe", "recipe_from_words",
]  # fmt: skip
