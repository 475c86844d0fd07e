"""Skipped: notes on the parameters that a step's `where` selects but that it skips because of their dtype.

No step and no training changes integers, complex numbers and 8-bit floats (dtypes.py). The executor notes
each of them once per step, after the step's own events, so that nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tersor.dtypes import skip_reason
from tersor.model.sites import Site, globs_of
from tersor.record.events import Group, Note
from tersor.record.ledger import Ledger

LEFT = "left as they are"  # the key of the executor's group of such notes


def skipped_sites(
    step: Any, sites: Mapping[str, Site], ledger: Ledger, at: int, done: Collection[str]
) -> Group | None:
    """The notes for step number `at`, after it ran; None if there are none. `done`: sites to leave out."""
    if getattr(step, "lossless", False):  # the entropy step writes its own notes on these
        return None
    noted = {entry.site for entry in ledger.entries if entry.step == at} | set(done)
    notes = [
        Note(site.name, "skipped", skip_reason(site.dtype))
        for site in sites.values()
        if site.kind != "buffer" and not site.floating and site.name not in noted
        if selected(step.where, site.name)
    ]  # fmt: skip
    return Group(LEFT, tuple(notes)) if notes else None


def selected(where: str | Collection[str], name: str) -> bool:
    """Whether the globs match this name and no "!" glob excludes it."""
    wanted, unwanted = (any(fnmatchcase(name, glob) for glob in globs) for globs in globs_of(where))
    return wanted and not unwanted
