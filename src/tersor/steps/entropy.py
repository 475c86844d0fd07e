"""Entropy: store every leaf as the bytes of an entropy coder, without loss.

bits ~ N * H(leaf)        canonical Huffman (Huffman 1952) or rANS (Duda 2013); coder="max" also tries coders
                          that use rows, columns and neighbors, and takes the fewest bytes for each leaf
A mask is coded by itself, and elements that it hides are not stored. A leaf that no coder shortens stays as
it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.dtypes import CODED, skip_reason
from tersor.encode import coded_if_shorter
from tersor.forms import PROFILES, At, Form, uncoded
from tersor.model.sites import Site, select
from tersor.record.events import Edit, Group, Note, site_group
from tersor.settings import check_settings, check_word

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Code every leaf losslessly, with the coder that needs the fewest bytes."""

    name: ClassVar[str] = "entropy"
    lossless: ClassVar[bool] = True
    loops: ClassVar[tuple[str, ...]] = ("tersor.coders.mixing.mixing_loops",)  # the slowest to compile
    # "max": the fewest bytes. "fast": decodes tens of times as fast. Or one coder: "huffman", "rans".
    coder: str = "max"
    where: str | tuple[str, ...] = "*"  # which sites, as a glob; "*" is everything, buffers too

    def __post_init__(self) -> None:
        check_settings(self)
        check_word(self, "coder", PROFILES)

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def run(self, view: View) -> Iterator[Group]:
        sites = list(view.sites.values()) if self.where == "*" else select(view.sites, self.where, self.name)
        left = [site for site in sites if site.name not in view.done]
        with side_by_side(lambda site: self.both(view.form(site)), left) as found:
            for number, (site, (plain, after)) in enumerate(zip(left, found, strict=True), 1):
                form = view.form(site)
                if after.nbytes >= form.nbytes:
                    alone = "" if site.dtype in CODED else skip_reason(site.dtype, coders=True)
                    text = alone or f"no coder shortens its {form.nbytes} bytes"
                    yield site_group(site.name, Note(site.name, "skipped", text))
                else:
                    text = f"{plain.nbytes} to {after.nbytes} bytes"
                    note = Note(site.name, "done", text, {"before": plain.nbytes, "after": after.nbytes})
                    yield site_group(site.name, Edit(site.name, form, after, "lossless"), note)
                view.observer.progress(len(sites) - len(left) + number, len(sites), site.name)

    def both(self, form: Form) -> tuple[Form, Form]:
        """The form without coded leaves, and with all of them coded."""
        plain = uncoded(form)
        return plain, self.code(plain)

    def code(self, form: Form) -> Form:
        """The tree with its leaves coded."""
        return At(form).rebuilt(lambda at: coded_if_shorter(at, self.coder))


@contextmanager
def side_by_side(work: Callable[[Site], Result], sites: Sequence[Site]) -> Iterator[Iterator[Result]]:
    """work(site) for each site in order, on all cores: coders release the GIL."""
    if len(sites) < 2:  # as in packing a file, where other threads code the other tensors
        yield map(work, sites)
        return
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        yield pool.map(work, sites)
    finally:
        pool.shutdown(cancel_futures=True)
