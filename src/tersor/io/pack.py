"""Pack: compress a weights file to .tersor without the model. unpack.py is the inverse.

For each tensor: read it, run the recipe's steps on it, write the result, drop it; several at a time, on all
cores. Steps that train or need all weights at once need the model and are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tersor.core.recipe import Recipe
from tersor.core.run import Executor
from tersor.core.state import State, digest_of
from tersor.core.step import Needs
from tersor.dtypes import as_numbers
from tersor.errors import RefusedError
from tersor.files import atomic, output
from tersor.forms import Dense, Form
from tersor.io.attached import FILES, OURS, attachments_of, notes_of
from tersor.io.checkpoint import Checkpoint
from tersor.io.container_writer import Builder
from tersor.io.folder import inputs_of
from tersor.io.name_hints import describe, is_causal, is_mask, left_alone, left_text
from tersor.io.pool import in_order
from tersor.io.safetensors_file import TensorWriter, is_finite
from tersor.model.sites import PartOf, Selections, Site, finite
from tersor.record.ledger import START, Entry, Ledger
from tersor.record.observer import Observer
from tersor.steps import Entropy
from tersor.steps.given_recipe import Given, recipe_of

LOSSLESS = Entropy()
TIED = 65536  # bytes from which equal tensors are stored once; zero biases, say, are equal by chance


@dataclass(frozen=True)
class Packed:
    """The result of pack()."""

    tensors: int
    aliases: Mapping[str, str]  # tied or equal tensors, stored once
    before: int  # bytes of the tensors
    nbytes: int  # bytes of the file
    ledger: Ledger = field(repr=False)  # without forms
    key: str  # the checkpoint's key of the tensors; "" if they are all of it
    left: Mapping[str, list[str]]  # by guessed kind: names of tensors that no step changed because of it
    ignored: Mapping[str, int | None]  # other contents -> tensors in them; None: a file not opened
    reasons: Mapping[str, str]  # why some of these were left out
    attached: Mapping[str, int]  # files that went along -> bytes
    read: int  # bytes of the files with the weights, the index too
    stripped: str = ""  # prefixes of wrappers that all names had: "module."


def pack(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Given = LOSSLESS,
    *,
    key: str | None = None,
    seed: int = 0,
    attach: bool = True,
    tiny: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Packed:
    """Write the tensors of `weights` (a .safetensors, a folder of them, a .pt state dict) to a .tersor file;
    with `key` only those under it: key="g_ema" for {"g_ema": {...}, "d": {...}}.

    `recipe`: as for run(); lossless by default. With `attach` the configuration, tokenizer and licence of a
    folder go along, and unpack() writes them again; never with `tiny`, which writes the short header, as in
    save(). The same weights and recipe give the same bytes for any number of `workers` (threads; default: one
    per core). Refused, with nothing written: a step that needs the whole model, a `where` that matches
    nothing, weights with NaN, an `out` that is a file of `weights`.
    """
    recipe = recipe_of(recipe, seed)
    check_steps(recipe)
    out = output(out, inputs_of(weights))
    with Checkpoint(weights, key) as source:
        packing = Packing(source, recipe, observer or Observer())
        attached = attachments_of(source) if attach and not tiny else notes_of(source)
        if tiny and FILES in attached:
            source.ignored["metadata of the .safetensors"] = 0
        attached = {} if tiny else attached
        with atomic(out) as file, TensorWriter(out.parent) as tensors:
            builder = Builder(tensors, tiny=tiny)
            for result in in_order(source.slots, packing.nbytes, source.form, packing.work, workers):
                packing.keep(result, builder)
                del result  # frees its memory before the next one is awaited
            ledger = packing.ledger()
            packing.check_lock(ledger.base, builder.digests)
            for name, data in attached.items():
                builder.attach(name, data)
            nbytes = builder.finish(file, packing.aliases, ledger)
        return Packed(
            len(source.slots), packing.aliases, packing.before, nbytes, ledger, source.key, packing.left(),
            {name: count for name, count in source.ignored.items() if name not in attached}, source.reasons,
            {name: len(data) for name, data in attached.items() if not name.startswith(OURS)},
            source.read_nbytes, source.stripped,
        )  # fmt: skip


def check_steps(recipe: Recipe) -> None:
    """Refuse steps that cannot work on a single tensor."""
    for step in recipe.steps:
        if step.needs is not Needs.NOTHING:
            alone = hasattr(step, "per") and replace(step, per="tensor").needs is Needs.NOTHING
            way_out = "Give it per=tensor" if alone else "Leave it out"
            raise RefusedError(
                f"pack: {step.name}, as it is set, needs the whole model: to train or measure it, or to use "
                f"all its weights at once. {way_out} here, or run it with the model: "
                f"tersor run MODEL --task TASK --recipe RECIPE"
            )


@dataclass(frozen=True)
class Result:
    """One compressed tensor."""

    site: Site
    given: str  # digest before
    nbytes: int  # bytes before
    form: Form
    entries: list[Entry]


class Packing:
    """The state of one pack. Its memory does not grow with the size of tensors."""

    def __init__(self, source: Checkpoint, recipe: Recipe, observer: Observer) -> None:
        self.source, self.recipe, self.observer = source, recipe, observer
        self.sites = {name: describe(name, slot) for name, slot in source.slots.items()}
        self.aliases = dict(source.aliases)
        self.base: dict[str, str] = {}  # digests of the given tensors
        self.entries: list[list[Entry]] = [[] for _ in recipe.steps]
        self.stored: dict[tuple[str, str], str] = {}  # digests before and after -> site
        self.found: dict[str, Site] = {}  # sites, with kinds corrected from values
        self.before = self.kept = 0
        # With all sites done, a step only checks that its `where` matches something.
        self.run(self.sites, {}, frozenset(self.sites))
        self.selections = Selections(self.sites)

    def run(
        self, sites: Mapping[str, Site], forms: Mapping[str, Form], done: frozenset[str] = frozenset()
    ) -> State:
        """Run the recipe on the sites that are not done; `forms` has their forms. Globs see all names."""
        state = State(sites, forms, self.source.aliases, Ledger(""))
        return Executor(state, self.recipe, done=done).run()

    def nbytes(self, name: str) -> int:
        return self.source.slots[name].nbytes

    def work(self, name: str, given: Dense) -> Result:
        """Compress one tensor. Called from several threads, so it does not change `self`."""
        site = self.sites[name]
        if not all(map(is_finite, given.slices())):
            wide = as_numbers(given.array)
            if is_mask(wide):
                site = replace(site, kind="buffer")
            finite({name: wide}, {name: site})
        elif site.is_weight and is_causal(given):
            site = replace(site, kind="mask")
        if site is self.sites[name]:
            result = self.run(PartOf({name: site}, self.selections), {name: given})
        else:  # with another kind globs may pick other sites
            sites = {**self.sites, name: site}
            result = self.run(sites, {name: given}, frozenset(sites) - {name})
        form, entries = result.forms[name], result.ledger.entries
        form.digest  # noqa: B018  computed in this thread, then cached
        return Result(site, given.digest, given.nbytes, form, entries)

    def keep(self, result: Result, builder: Builder) -> None:
        """Write a compressed tensor, or add an alias if an equal one was written."""
        name = result.site.name
        self.before += result.nbytes
        self.kept += 1
        self.observer.progress(self.kept, len(self.sites), name)
        twin = self.stored.setdefault((result.given, result.form.digest), name)
        if twin != name and result.nbytes >= TIED:
            self.aliases |= {a: twin for a, site in self.aliases.items() if site == name} | {name: twin}
            return
        self.base[name] = result.given
        self.found[name] = result.site
        for entry in result.entries:
            self.entries[entry.step].append(entry)
        builder.add(result.site, result.form)

    def ledger(self) -> Ledger:
        """The ledger that a run on the whole model would write, without seconds, so that the same weights
        give the same bytes."""
        ledger = Ledger(digest_of(self.base), self.recipe.to_json())
        if self.recipe.steps and (text := left_text(self.left())):
            ledger.entries.append(Entry(0, START, "", kind="left", text=text))
        for entries in self.entries:
            ledger.entries += masks_first(entries)
        return ledger

    def left(self) -> dict[str, list[str]]:
        """Names of tensors that no step changed because of their guessed kind, by kind."""
        changed = {entry.site for entries in self.entries for entry in entries if entry.changes}
        return left_alone(self.found, changed)

    def check_lock(self, base: str, digests: Mapping[str, str]) -> None:
        """Refuse a result that differs from the recipe's lock file."""
        if self.recipe.base not in (None, base):
            raise RefusedError(f"pack: the lock is for base {self.recipe.base}, these weights are {base}")
        for site, digest in self.recipe.result:
            if digests.get(site) != digest:
                found = digests.get(site, "no such site")
                raise RefusedError(f"pack: {site} came out as {found}, the lock says {digest}")


def masks_first(entries: list[Entry]) -> list[Entry]:
    """The entries in the order of a run. Before the step it masks weights that came with zeros: an edit and a
    note each."""
    notes = {place for place, entry in enumerate(entries) if entry.kind == "masked"}
    masked = notes | {place - 1 for place in notes}
    rest = [entry for place, entry in enumerate(entries) if place not in masked]
    return [entries[place] for place in sorted(masked)] + rest
