"""Cluster: store each weight as an index into a short table of shared values.

w[o, i] ~ book[index[o, i]]      Han, Mao, Dally 2016, section 3; k-means in one dimension, exact if
affordable
stored     log2(K) bits a weight before coding, and 32 * K bits of table
With epochs the table is trained: the gradients of all weights that share an entry are added. Masked weights
take no part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from tersor.core.view import View
from tersor.encode import Store, refine
from tersor.forms import Codebook, Dense, Form
from tersor.forms.form import from_rows, to_rows
from tersor.maths.kmeans import INITS, cluster
from tersor.model.sites import Site
from tersor.record.events import Edit, Group, Note, site_group
from tersor.setting_effects import Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.retrain import Retrain


@dataclass(frozen=True, kw_only=True)
class Cluster(Retrain):
    """Share weights: k-means indices into a short table, which can be trained."""

    name: ClassVar[str] = "cluster"
    loops: ClassVar[tuple[str, ...]] = ("tersor.maths.kmeans_loop",)
    only: ClassVar[Only] = {"iterations": {"init": tuple(init for init in INITS if init != "exact")}}
    entries: int = 16  # values in a table
    per: str = "tensor"  # what shares a table: "tensor" or "channel"
    init: str = (
        "exact"  # "exact" (dynamic programming), or Lloyd's steps from "linear", "density", "kmeans++"
    )
    iterations: int = 50  # of Lloyd's algorithm

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.entries <= 32768, self, "entries", "a table has 1 to 32768 entries")
        check_word(self, "per", ("tensor", "channel"))
        check_word(self, "init", INITS)
        check(self.iterations >= 1, self, "iterations", "it is a count: 1 or more")
        check_effect(self)

    def run(self, view: View) -> Iterator[Group]:
        if self.epochs == 0:
            for site in view.each(self.where):
                edit = self.edit(view, site)
                yield site_group(site.name, edit, self.note(site.name, cast(Form, edit.after)))
            return
        edits = {site.name: self.edit(view, site) for site in view.weights(self.where)}
        after, events = self.retrained(view, edits)
        yield Group("all", (*events, *(self.note(name, after[name]) for name in edits)))

    def edit(self, view: View, site: Site) -> Edit:
        after, how = refine(view.form(site), self.storing(view.seed_for(site)), site.axis)
        return Edit(site.name, view.form(site), after, how)

    def storing(self, seed: int) -> Store:
        def store(w: Tensor, keep: Tensor | None, axis: int) -> Form:
            rows = to_rows(w.float(), axis)
            mask = torch.ones_like(rows, dtype=torch.bool) if keep is None else to_rows(keep, axis)
            units = [rows] if self.per == "tensor" else list(rows.split(1))
            masks = [mask] if self.per == "tensor" else list(mask.split(1))
            found = [self.table(u, m, seed) for u, m in zip(units, masks, strict=True)]
            longest = max(len(book) for _, book in found)
            books = [torch.nn.functional.pad(book, (0, longest - len(book))) for _, book in found]
            index = torch.cat([index for index, _ in found])
            index = index.to(torch.uint8 if longest <= 256 else torch.int16)
            book = books[0] if self.per == "tensor" else torch.stack(books)
            return Codebook(
                Dense(from_rows(index, tuple(w.shape), axis).contiguous()), Dense(book), None, axis
            )

        return store

    def table(self, w: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(index of w's shape, book) of the weights under the mask. If all are hidden: one entry, zero."""
        index = torch.zeros(w.shape, dtype=torch.int64)
        if not mask.any():
            return index, torch.zeros(1)
        chosen, book = cluster(w[mask], self.entries, init=self.init, iterations=self.iterations, seed=seed)
        index[mask] = chosen
        return index, book

    def note(self, site: str, after: Form) -> Note:
        count = sum(node.book.shape[-1] for _, node in after.walk() if isinstance(node, Codebook))
        return Note(site, "done", f"{count} shared values", {"entries": count})
