"""Verify: check a whole file site by site, without stopping at the first fault.

checks   digests of the bytes, the rules of each form, decoded values, the ledger's last digests;
         grids and attachments likewise
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
    """The result for one site, edge or attachment, or for the file as a whole (site "")."""

    site: str
    sound: bool
    text: str
    nbytes: int = 0  # stored for this site


def verify(
    path: str | os.PathLike[str], *, limit: int | None = None, workers: int | None = None
) -> list[Check]:
    """A row for the file and for each site, grid and attachment. StorageError if it cannot be opened."""
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
            rows += [row, *check_ledger(name, last, file.digests[name])]
        for edge in file.grids:
            rows += [check_grid(file, edge), *check_ledger(edge, last, *grid_digests(file, edge))]
        rows += [check_attachment(file, name) for name in file.attachments]
        rows += [
            Check(site, False, "the ledger edits a site that the file lacks")
            for site in last
            if site not in file.sites and site not in file.grids
        ]
        return rows


def last_forms(ledger: Ledger) -> dict[str, str]:
    """The last digest of each site and edge in the ledger, without those inside a module that a replacement
    removed."""
    last: dict[str, str] = {}
    for entry in ledger.entries:
        if entry.how == "replace":
            inside = (f"{entry.site}.", f"{entry.site}/") if entry.site else ""  # of sites, of edges
            last = {name: digest for name, digest in last.items() if not name.startswith(inside)}
        elif entry.after:
            last[entry.site] = entry.after
    return last


def check_ledger(name: str, last: Mapping[str, str], *digests: str) -> list[Check]:
    """A row if the ledger's last digest of a site or edge is none of these."""
    if not digests or last.get(name, digests[0]) in digests:
        return []
    return [Check(name, False, f"the ledger ends with form {last[name]}, the file holds {digests[0]}")]


def grid_digests(file: TersorFile, edge: str) -> tuple[str, ...]:
    """The digest of a grid as it is and as not stale. A grid becomes stale without a ledger entry."""
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
    """Number of NaN and infinite values. A buffer may hold infinities, since attention masks do."""
    count = 0
    for part in slices:
        if part.is_floating_point() or part.is_complex():
            wide = as_numbers(part)
            count += int((wide.isnan() if buffer else ~wide.isfinite()).sum())
    return count
