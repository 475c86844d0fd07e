"""Verify: a file checked site by site, all of it, with what was found; it does not stop at the first fault.

bytes against digests, forms against their rules, decoded values, the ledger against what is stored;
grids of edges and attachments likewise
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tersor.dtypes import as_numbers
from tersor.errors import FormatError
from tersor.forms import Form
from tersor.io.container import NUMBER, TersorFile
from tersor.io.document import ATTACHMENT
from tersor.io.pool import in_order
from tersor.record.ledger import Ledger


@dataclass(frozen=True)
class Check:
    """One site, edge or attachment, or the file as a whole (site "")."""

    site: str
    sound: bool
    text: str
    nbytes: int = 0  # stored for this site


def verify(
    path: str | os.PathLike[str], *, limit: int | None = None, workers: int | None = None
) -> list[Check]:
    """A row for the file, and for each site, grid and attachment. StorageError where it cannot be opened."""
    try:
        file = TersorFile(path, limit=limit)
    except FormatError as error:
        return [Check("", False, str(error))]
    with file:
        size, kind = file.source.nbytes, "tiny" if file.source.tiny else f"format {NUMBER}"
        rows = [Check("", True, f"{kind}, {len(file.sites)} sites, text sound", size)]
        last = last_forms(file.ledger)
        read, work = partial(read_site, file), partial(check_site, file)
        checks = in_order(file.sites, file.nbytes, read, work, workers)
        for name, row in zip(file.sites, checks, strict=True):
            rows += [row, *ended(name, last, file.digests[name])]
        for edge in file.grids:
            rows += [check_grid(file, edge), *ended(edge, last, *fresh(file, edge))]
        rows += [check_attachment(file, name) for name in file.attachments]
        rows += [
            Check(site, False, "the ledger edits a site that the file lacks")
            for site in last
            if site not in file.sites and site not in file.grids
        ]
        return rows


def last_forms(ledger: Ledger) -> dict[str, str]:
    """The digest that the ledger ends with of each site and edge. What a replacement removed, or bore
    anew, is not among them."""
    last: dict[str, str] = {}
    for entry in ledger.entries:
        if entry.how == "replace":
            inside = f"{entry.site}." if entry.site else ""
            last = {name: digest for name, digest in last.items() if not name.startswith(inside)}
        elif entry.after:
            last[entry.site] = entry.after
    return last


def ended(name: str, last: Mapping[str, str], *digests: str) -> list[Check]:
    """A row where the ledger does not end with any of these digests."""
    if not digests or last.get(name, digests[0]) in digests:
        return []
    return [Check(name, False, f"the ledger ends with form {last[name]}, the file holds {digests[0]}")]


def fresh(file: TersorFile, edge: str) -> tuple[str, ...]:
    """The digest of a grid, and that from before it was stale: an edit elsewhere makes it so."""
    try:
        grid = file.grid(edge)
    except FormatError:
        return ()
    return grid.digest, grid.replace(stale=False).digest


def check_grid(file: TersorFile, edge: str) -> Check:
    try:
        grid = file.grid(edge)
    except FormatError as error:
        return Check(edge, False, str(error))
    return Check(edge, True, f"{grid!r}", grid.nbytes)


def check_attachment(file: TersorFile, name: str) -> Check:
    try:
        data = file.attachment(name)
    except FormatError as error:
        return Check(f"{ATTACHMENT}{name}", False, str(error))
    return Check(
        f"{ATTACHMENT}{name}", True, f"{len(data):,} bytes", file.source.slots[f"{ATTACHMENT}{name}"].nbytes
    )


def read_site(file: TersorFile, name: str) -> Form | FormatError:
    try:
        return file.read(name)
    except FormatError as error:
        return error


def check_site(file: TersorFile, name: str, form: Form | FormatError) -> Check:
    if isinstance(form, FormatError):
        return Check(name, False, str(form))
    try:
        file.check(name, form)
        bad = not_finite(file.slices(name, form), buffer=file.sites[name].kind == "buffer")
    except FormatError as error:
        return Check(name, False, str(error))
    if bad:
        return Check(name, False, f"{bad} of {math.prod(form.shape)} values are NaN or infinite", form.nbytes)
    return Check(name, True, f"{form!r}", form.nbytes)


def not_finite(slices: Iterable[Tensor], *, buffer: bool) -> int:
    """How many values are NaN or infinite. A buffer may hold infinities: attention masks do."""
    count = 0
    for part in slices:
        if part.is_floating_point() or part.is_complex():
            wide = as_numbers(part)
            count += int((wide.isnan() if buffer else ~wide.isfinite()).sum())
    return count
