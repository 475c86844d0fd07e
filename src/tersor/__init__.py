"""Tersor: terse tensors. A trained PyTorch model and its task go in, a much smaller file comes out, measured.

The public names, each imported when it is first asked for: `import tersor` costs milliseconds.
"""

# ruff: noqa: F401 (type checkers read these imports; at run time __getattr__ does them)

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tersor.core.history import replay, undo
    from tersor.core.recipe import Recipe
    from tersor.core.state import State
    from tersor.core.step import Needs, Step
    from tersor.core.view import View
    from tersor.errors import (
        BudgetError,
        FormatError,
        InternalError,
        JournalError,
        MissingError,
        RefusedError,
        SettingError,
        SiteError,
        StorageError,
        TaskError,
        TersorError,
        UserCodeError,
    )
    from tersor.io.container import load
    from tersor.io.container_writer import save
    from tersor.io.pack import pack
    from tersor.io.patch.diff import diff
    from tersor.io.patch.patch import patch
    from tersor.io.unpack import unpack
    from tersor.io.verify import verify
    from tersor.model.builtin_metrics import METRICS
    from tersor.model.builtin_tasks import digits, fashion_mnist
    from tersor.model.changes import Replace, Set
    from tersor.model.loader import TensorBatches
    from tersor.model.logits import Logits
    from tersor.model.metric import Metric
    from tersor.model.task import Task
    from tersor.record.events import Cut, Edit, Group, Note
    from tersor.record.ledger import Ledger
    from tersor.record.observer import Observer
    from tersor.search.compress import compress, search_task
    from tersor.steps import (
        STEPS,
        Cluster,
        Distill,
        Entropy,
        Export,
        Factorize,
        Finetune,
        Fold,
        Measure,
        Penalize,
        Prune,
        Quantize,
        Rdoq,
        Shorten,
        Slim,
        read_recipe,
    )
    from tersor.steps.given_recipe import run
    from tersor.steps.own_training import folded, trainable
    from tersor.steps.recipe_text import lock

# Where each public name lives.
MODULES: dict[str, tuple[str, ...]] = {
    "tersor.record.events": ("Cut", "Edit", "Group", "Note"),
    "tersor.core.history": ("replay", "undo"),
    "tersor.record.ledger": ("Ledger",),
    "tersor.record.observer": ("Observer",),
    "tersor.core.recipe": ("Recipe",),
    "tersor.core.state": ("State",),
    "tersor.core.step": ("Needs", "Step"),
    "tersor.core.view": ("View",),
    "tersor.errors": (
        "BudgetError", "FormatError", "InternalError", "JournalError", "MissingError", "RefusedError",
        "SettingError", "SiteError", "StorageError", "TaskError", "TersorError", "UserCodeError",
    ),
    "tersor.io.container": ("load",),
    "tersor.io.container_writer": ("save",),
    "tersor.io.pack": ("pack",),
    "tersor.io.patch.diff": ("diff",),
    "tersor.io.patch.patch": ("patch",),
    "tersor.io.unpack": ("unpack",),
    "tersor.io.verify": ("verify",),
    "tersor.model.changes": ("Replace", "Set"),
    "tersor.model.loader": ("TensorBatches",),
    "tersor.model.logits": ("Logits",),
    "tersor.model.metric": ("Metric",),
    "tersor.model.builtin_metrics": ("METRICS",),
    "tersor.model.task": ("Task",),
    "tersor.model.builtin_tasks": ("digits", "fashion_mnist"),
    "tersor.search.compress": ("compress", "search_task"),
    "tersor.steps.given_recipe": ("run",),
    "tersor.steps.own_training": ("folded", "trainable"),
    "tersor.steps.recipe_text": ("lock",),
    "tersor.steps": (
        "STEPS", "Cluster", "Distill", "Entropy", "Export", "Factorize", "Finetune", "Fold", "Measure",
        "Penalize", "Prune", "Quantize", "Rdoq", "Shorten", "Slim", "read_recipe",
    ),
}  # fmt: skip
HOMES = {name: module for module, names in MODULES.items() for name in names}

# Functions that check the kinds of their arguments, and raise errors of our own: boundary.py.
ENTRANCES = frozenset({
    "compress", "diff", "digits", "fashion_mnist", "folded", "load", "lock", "pack", "patch", "read_recipe",
    "replay", "run", "save", "search_task", "trainable", "undo", "unpack", "verify",
})  # fmt: skip

__all__ = ["__version__", *HOMES]  # noqa: PLE0604, PLE0605 (the table is the list)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    if name in ENTRANCES:
        from tersor.boundary import entrance

        value = entrance(value)
        value.__module__ = __name__  # pickle finds it here
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
