"""Run: the only writer. Steps yield events; this applies them, group by group, and keeps the ledger.

    given model -> forms (all Dense) -> step, step, step -> forms, ledger
Every edit is checked before it counts: it names the form that is there, keeps the shape, is finite, and
treats the old form as it says (`wrap` holds it, `lossless` decodes to equal bits).
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.journal import Journal
from tersor.core.ledger import Ledger
from tersor.core.recipe import Recipe, as_recipe
from tersor.core.step import HOW, Edit, Group, Note
from tersor.core.view import View, Watch
from tersor.errors import RefusedError, SettingError
from tersor.forms import Dense, Form
from tersor.forms.form import DIGEST, as_bytes
from tersor.model.dress import dress
from tersor.model.sites import Site, finite, sites_of
from tersor.model.task import Task


@dataclass(frozen=True)
class Compressed:
    """A model as forms: what `run` returns, what a file holds."""

    sites: Mapping[str, Site]
    forms: Mapping[str, Form]
    aliases: Mapping[str, str]  # other names of tied tensors -> site
    ledger: Ledger
    base: nn.Module | None = None  # the model as it was given; a file has none

    def model(self, base: nn.Module | None = None) -> nn.Module:
        """A plain copy of the model with the decoded weights; one loaded from a file needs `base`, same
        class."""
        module = self.base if base is None else base
        if module is None:
            raise SettingError("a file holds weights, not code: give the model, model(base=MyNet())")
        return dress(module, self.forms, self.sites, self.aliases)

    def state_dict(self) -> dict[str, Tensor]:
        """The decoded weights by their names in the model, aliases too."""
        decoded = {name: form.decode().to(self.sites[name].torch_dtype) for name, form in self.forms.items()}
        return decoded | {alias: decoded[name] for alias, name in self.aliases.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, without file headers."""
        return sum(form.nbytes for form in self.forms.values())

    @property
    def digest(self) -> str:
        return digest_of(self.forms)


def digest_of(forms: Mapping[str, Form]) -> str:
    """One digest for all forms by name."""
    text = "\n".join(f"{name} {form.digest}" for name, form in sorted(forms.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST]


def start(model: nn.Module) -> Compressed:
    """A model as it is: every tensor Dense, nothing done yet. Refuses NaN and infinite weights."""
    sites, tensors, aliases = sites_of(model)
    finite(tensors, sites)
    forms = {name: Dense(value.cpu().clone()) for name, value in tensors.items()}
    return Compressed(sites, forms, aliases, Ledger(digest_of(forms), {}), copy.deepcopy(model))


def run(
    model: nn.Module | Compressed, recipe: Recipe | Iterable[Any] | Any, task: Task | None = None, *,
    seed: int = 0, journal: str | Path | None = None, resume: bool = False, watch: Watch | None = None,
    out: str | Path = ".",
) -> Compressed:  # fmt: skip
    """Compress a model by a recipe: a Recipe, a step, or a list of steps.

    The model is left as it is. `task` feeds, scores and trains it; steps that need none run without. With
    `journal` (a folder) every applied group is kept on disk, and `resume` goes on after the last one. Files
    that steps write (exports) go to `out`.
    """
    recipe, watch = as_recipe(recipe, seed), watch or Watch()
    given = model if isinstance(model, Compressed) else start(model)
    if recipe.base is not None and recipe.base != digest_of(given.forms):
        raise RefusedError(
            f"recipe: the lock is for base {recipe.base}, this model is {digest_of(given.forms)}"
        )
    if task is not None and given.base is not None:
        task.check(dress(given.base, given.forms, given.sites, given.aliases))
    ledger = Ledger(digest_of(given.forms), recipe.to_json())
    kept = open_journal(journal, given, recipe, task, resume=resume) if journal is not None else None
    forms = dict(given.forms)
    for number, step in enumerate(recipe.steps):
        watch.step(number + 1, len(recipe.steps), step.name)
        began, begin = time.perf_counter(), dict(forms)
        lines = [line for line in kept.lines if line.step == number] if kept is not None else []
        done: set[str] = set()
        for line in lines:
            group = line.group(begin)
            done |= {event.site for event in group}
            apply(forms, group, given.sites, step.name)
            ledger.record(number, step.name, group)
        if any(line.end for line in lines):
            continue
        view = View(
            given.sites, begin, given.aliases, given.base, given.forms, task, step.name, number,
            recipe.seed, watch, Path(out), kept, frozenset(done),
        )  # fmt: skip
        for group in step.run(view):
            group = tuple(group)
            if group and all(event.site in done for event in group):
                continue
            apply(forms, group, given.sites, step.name)
            ledger.record(number, step.name, group)
            if kept is not None:
                kept.append(number, group)
        ended = (Note("", "time", f"{step.name} took its time", {"seconds": time.perf_counter() - began}),)
        ledger.record(number, step.name, ended)
        if kept is not None:
            kept.append(number, ended, end=True)
    result = replace(given, forms=forms, ledger=ledger)
    compare_lock(recipe, result)
    return result


def open_journal(
    folder: str | Path, given: Compressed, recipe: Recipe, task: Task | None, *, resume: bool
) -> Journal:
    fingerprints = {
        "model": digest_of(given.forms),
        "data": "none" if task is None else task.digest(),
        "recipe": recipe.digest,
    }
    # Under torchrun or accelerate launch every process runs the recipe; one of them writes.
    first = int(os.environ.get("RANK", "0")) == 0
    return Journal(folder, fingerprints, resume=resume, writes=first)


def apply(forms: dict[str, Form], group: Group, sites: Mapping[str, Site], who: str) -> None:
    """Check a group's edits and put them in, all or none."""
    after = {}
    for event in group:
        if isinstance(event, Edit):
            check_edit(event, forms, sites, who)
            after[event.site] = event.after
    forms |= after


def check_edit(edit: Edit, forms: Mapping[str, Form], sites: Mapping[str, Site], who: str) -> None:
    """Refuse an edit that is not what it says it is."""
    if edit.site not in forms or forms[edit.site].digest != edit.before.digest:
        raise RefusedError(f"{who}: {edit.site}: the edit starts from a form that is not there")
    if edit.how not in HOW:
        raise RefusedError(f"{who}: {edit.site}: an edit is one of {', '.join(HOW)}, not {edit.how!r}")
    if tuple(edit.after.shape) != sites[edit.site].shape:
        raise RefusedError(
            f"{who}: {edit.site}: shape {list(sites[edit.site].shape)} became {list(edit.after.shape)}"
        )
    if edit.how == "wrap" and edit.before.digest not in {node.digest for _, node in edit.after.walk()}:
        raise RefusedError(f"{who}: {edit.site}: a wrap must hold the old form")
    if edit.how == "lossless":
        pairs = zip(edit.before.slices(), edit.after.slices(), strict=True)
        if not all(same_bits(before, after) for before, after in pairs):
            raise RefusedError(f"{who}: {edit.site}: a lossless edit must decode to the same bits")
    elif not all(part.to(sites[edit.site].torch_dtype).isfinite().all() for part in edit.after.slices()):
        raise RefusedError(
            f"{who}: {edit.site}: the new form decodes to NaN or infinity; nothing was changed"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(torch.from_numpy(as_bytes(tensor)) for tensor in (a, b)))


def compare_lock(recipe: Recipe, result: Compressed) -> None:
    for site, digest in recipe.result:
        found = result.forms[site].digest if site in result.forms else "no such site"
        if found != digest:
            raise RefusedError(
                f"lock: {site} came out as {found}, the lock says {digest}: not the same machine or data"
            )


def undo(result: Compressed, steps: int | None = None) -> Compressed:
    """The state before the last `steps` steps of the ledger (default: before all), bit for bit."""
    ledger = result.ledger
    total = len(ledger.recipe.get("steps", []))
    first = 0 if steps is None else total - steps
    if first < 0 or (steps is not None and steps < 0):
        raise SettingError(f"undo: steps={steps}, but the ledger has {total} steps")
    forms = dict(result.forms)
    for entry in reversed([entry for entry in ledger.edits() if entry.step >= first]):
        forms[entry.site] = stored(ledger, entry.before, entry.site)
    kept = [entry for entry in ledger.entries if entry.step < first]
    recipe = {**ledger.recipe, "steps": ledger.recipe.get("steps", [])[:first]}
    return replace(result, forms=forms, ledger=Ledger(ledger.base, recipe, kept, ledger.forms))


def replay(model: nn.Module | Compressed, ledger: Ledger) -> Compressed:
    """Apply a ledger's stored results to the model it began with, without computing them again."""
    given = model if isinstance(model, Compressed) else start(model)
    if digest_of(given.forms) != ledger.base:
        raise RefusedError(
            f"replay: the ledger begins with model {ledger.base}, this one is {digest_of(given.forms)}"
        )
    forms = dict(given.forms)
    for entry in ledger.edits():
        forms[entry.site] = stored(ledger, entry.after, entry.site)
    return replace(given, forms=forms, ledger=ledger)


def stored(ledger: Ledger, digest: str, site: str) -> Form:
    if digest not in ledger.forms:
        raise RefusedError(
            f"{site}: form {digest} is not stored with this ledger. Files hold the last forms only; "
            f"keep the result of run(), or its journal, to undo or replay."
        )
    return ledger.forms[digest]


def lock(result: Compressed) -> dict[str, Any]:
    """The lock file: the recipe with every setting spelled out, where it began and what came of each site."""
    touched = {entry.site for entry in result.ledger.edits()}
    return {
        **result.ledger.recipe,
        "base": result.ledger.base,
        "result": {name: form.digest for name, form in result.forms.items() if name in touched},
    }
