"""Pack: a weights file as .tersor without the model; unpack.py is the way back.

Read a tensor, run the recipe's steps on it, write what it became, drop it: some at a time, on all cores.
Steps that look at all weights together, or train, need the model and are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tersor.core.recipe import Recipe
from tersor.core.run import Executor
from tersor.core.state import State, digest_of
from tersor.core.step import Needs
from tersor.dtypes import as_numbers
from tersor.errors import RefusedError
from tersor.files import atomic, output
from tersor.forms import Dense, Form
from tersor.io.builder import Builder
from tersor.io.checkpoint import Checkpoint, read_from
from tersor.io.name_hints import describe, is_causal, is_mask, left_alone, left_text
from tersor.io.pool import in_order
from tersor.io.safetensors_file import TensorWriter, is_finite
from tersor.model.sites import Site, finite
from tersor.record.ledger import START, Entry, Ledger
from tersor.record.observer import Observer

TIED = 65536  # bytes from which equal tensors are stored once: zero biases are equal by chance


@dataclass(frozen=True)
class Packed:
    """What pack did."""

    tensors: int
    aliases: Mapping[str, str]  # tied or equal tensors, stored once
    before: int  # bytes of the tensors
    nbytes: int  # bytes of the file
    ledger: Ledger  # without forms
    key: str  # under which the checkpoint holds them, if they are not all of it
    left: Mapping[str, list[str]]  # by what they are taken for: tensors that no step changed for it
    ignored: Mapping[str, int | None]  # what it holds besides, and the tensors in it; None: a file not opened


def pack(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    key: str | None = None,
    tiny: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Packed:
    """Write the tensors of `weights` (a .safetensors, a folder of them, a .pt state dict) to a .tersor file;
    with `key` only those under it: "g_ema" of {"g_ema": {...}, "d": {...}}.

    The same weights and recipe give the same bytes, with any number of `workers` (threads; default: one for
    each core). `tiny` writes the short header of save(). A step that needs the whole model, a `where` that
    matches nothing, weights with NaN and an `out` that is one of the files of `weights` are refused, and
    nothing is written.
    """
    alone(recipe)
    out = output(out, read_from(weights))
    with Checkpoint(weights, key) as source:
        packing = Packing(source, recipe, observer or Observer())
        with atomic(out) as file, TensorWriter(out.parent) as tensors:
            builder = Builder(tensors, tiny=tiny)
            for one in in_order(source.slots, packing.nbytes, source.form, packing.work, workers):
                packing.keep(one, builder)
                del one  # or it waits in memory for the next one
            ledger = packing.ledger()
            packing.check_lock(ledger.base, builder.digests)
            nbytes = builder.finish(file, packing.aliases, ledger)
        return Packed(
            len(source.slots),
            packing.aliases,
            packing.before,
            nbytes,
            ledger,
            source.key,
            packing.left(),
            source.ignored,
        )


def alone(recipe: Recipe) -> None:
    """Refuse steps that cannot work on one tensor by itself."""
    for step in recipe.steps:
        if step.needs is not Needs.NOTHING:
            raise RefusedError(
                f"pack: {step.name}, as it is set, needs the whole model: to train or measure it, or to look "
                f"at all its weights at once. Leave it out here, or run it with the model: "
                f"tersor run MODEL --task TASK --recipe RECIPE"
            )


@dataclass(frozen=True)
class One:
    """What became of one tensor."""

    site: Site
    given: str  # its digest before
    nbytes: int  # and its bytes
    form: Form
    entries: list[Entry]


class Packing:
    """The state of one pack: nothing in it grows with the size of a tensor."""

    def __init__(self, source: Checkpoint, recipe: Recipe, observer: Observer) -> None:
        self.source, self.recipe, self.observer = source, recipe, observer
        self.sites = {name: describe(name, slot) for name, slot in source.slots.items()}
        self.aliases = dict(source.aliases)
        self.base: dict[str, str] = {}  # digests of what was given
        self.entries: list[list[Entry]] = [[] for _ in recipe.steps]
        self.stored: dict[tuple[str, str], str] = {}  # digests before and after -> site
        self.found: dict[str, Site] = {}  # sites as their values show them
        self.before = self.kept = 0
        self.names = frozenset(self.sites)
        # With every site done a step does nothing but look for what its `where` means.
        self.run(self.sites, {}, self.names)

    def run(self, sites: Mapping[str, Site], forms: Mapping[str, Form], done: frozenset[str]) -> State:
        """The recipe on the sites that are not done, of which the forms are given; steps see all names."""
        state = State(sites, forms, self.source.aliases, Ledger(""))
        return Executor(state, self.recipe, done=done).run()

    def nbytes(self, name: str) -> int:
        return self.source.slots[name].nbytes

    def work(self, name: str, given: Dense) -> One:
        """Compress one tensor; called by many threads, so it changes nothing here."""
        sites = self.sites
        if not all(map(is_finite, given.slices())):
            wide = as_numbers(given.array)
            if is_mask(wide):
                sites = {**sites, name: replace(sites[name], kind="buffer")}
            finite({name: wide}, sites)
        elif sites[name].is_weight and is_causal(given):
            sites = {**sites, name: replace(sites[name], kind="mask")}
        result = self.run(sites, {name: given}, self.names - {name})
        form, entries = result.forms[name], result.ledger.entries
        form.digest  # noqa: B018  reckoned here, on its own core, and kept
        return One(sites[name], given.digest, given.nbytes, form, entries)

    def keep(self, one: One, builder: Builder) -> None:
        """Write what became of a tensor, or note that it is there already."""
        name = one.site.name
        self.before += one.nbytes
        self.kept += 1
        self.observer.progress(self.kept, len(self.sites), name)
        twin = self.stored.setdefault((one.given, one.form.digest), name)
        if twin != name and one.nbytes >= TIED:
            self.aliases |= {a: twin for a, site in self.aliases.items() if site == name} | {name: twin}
            return
        self.base[name] = one.given
        self.found[name] = one.site
        for entry in one.entries:
            self.entries[entry.step].append(entry)
        builder.add(one.site, one.form)

    def ledger(self) -> Ledger:
        """What a run on the whole model would have written, without forms. Without seconds too: the same
        weights give the same bytes."""
        ledger = Ledger(digest_of(self.base), self.recipe.to_json())
        if self.recipe.steps and (text := left_text(self.left())):
            ledger.entries.append(Entry(0, START, "", kind="left", text=text))
        for entries in self.entries:
            ledger.entries += came_first(entries)
        return ledger

    def left(self) -> dict[str, list[str]]:
        """What no step changed for what it is taken for, by kind."""
        changed = {entry.site for entries in self.entries for entry in entries if entry.changes}
        return left_alone(self.found, changed)

    def check_lock(self, base: str, digests: Mapping[str, str]) -> None:
        """A lock file names what must come out."""
        if self.recipe.base not in (None, base):
            raise RefusedError(f"pack: the lock is for base {self.recipe.base}, these weights are {base}")
        for site, digest in self.recipe.result:
            if digests.get(site) != digest:
                found = digests.get(site, "no such site")
                raise RefusedError(f"pack: {site} came out as {found}, the lock says {digest}")


def came_first(entries: list[Entry]) -> list[Entry]:
    """Before a step of a run all weights that came with zeros get their masks: an edit and a note each."""
    notes = {place for place, entry in enumerate(entries) if entry.kind == "masked"}
    came = notes | {place - 1 for place in notes}
    rest = [entry for place, entry in enumerate(entries) if place not in came]
    return [entries[place] for place in sorted(came)] + rest
