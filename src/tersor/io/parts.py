"""Parts: a file of weights as named arrays, whatever kind it is: what diff and patch compare.

A .tersor file gives its leaves, decoded; a checkpoint its tensors. One array in memory at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from tersor.errors import FormatError
from tersor.forms import Affine, Coded, Dense, Form, Masked, uncoded
from tersor.io.checkpoint import Checkpoint
from tersor.io.container import TersorFile
from tersor.io.tiny import Source
from tersor.io.trees import leaves

CHUNK = 4 << 20  # bytes hashed at once


class Leaf(NamedTuple):
    """A leaf of a .tersor file: as it is stored, what it means, and the mask above that hides some of it."""

    stored: Form
    array: Tensor
    keep: str | None  # the name of the mask's leaf; "" where it is no leaf by itself
    scale: Tensor | None  # of the grid, where these are its codes


class Parts:
    """The arrays of a file or folder, by name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.tersor: TersorFile | None = None
        self.checkpoint: Checkpoint | None = None
        self.site: tuple[str, dict[str, Leaf]] = ("", {})
        if is_tersor(self.path):
            self.tersor = TersorFile(self.path)
            self.names = list(self.tersor.places.found)
        else:
            self.checkpoint = Checkpoint(self.path)
            self.names = list(self.checkpoint.slots)
        self.known = set(self.names)

    def leaf(self, name: str) -> Leaf:
        """A leaf of a .tersor file by its name."""
        if self.tersor is None:
            raise FormatError(f"{self.path}: it is no .tersor file, so {name} has no leaves")
        site = name if name in self.tersor.sites else name.rpartition(":")[0]
        if self.site[0] != site:
            form = self.tersor.read(site)
            self.tersor.check(site, form)
            self.site = site, dict(leaves_of(form, site))
        return self.site[1][name]

    def array(self, name: str) -> Tensor:
        """A tensor, or what a leaf means."""
        return self.checkpoint.read(name) if self.checkpoint else self.leaf(name).array

    def digest(self) -> str:
        """SHA-256 of the file, or of a folder's files of weights and their names."""
        sha = hashlib.sha256()
        files = [self.path] if self.path.is_file() else sorted(f for f in self.path.iterdir() if f.is_file())
        for file in files:
            sha.update(b"" if self.path.is_file() else file.name.encode() + b"\0")
            with open(file, "rb") as source:
                while piece := source.read(CHUNK):
                    sha.update(piece)
        return sha.hexdigest()

    def close(self) -> None:
        for file in (self.tersor, self.checkpoint):
            if file is not None:
                file.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_tersor(path: Path) -> bool:
    """Whether it says of itself that it is a .tersor file, of either header."""
    if not path.is_file():
        return False
    with suppress(FormatError), Source(path) as source:
        return source.tiny or "tersor" in source.metadata
    return False


def leaves_of(form: Form, site: str) -> Iterator[tuple[str, Leaf]]:
    """(name, leaf) of each leaf of a site."""
    plain = dict(uncoded(form).walk())
    masks = {path: node for path, node in form.walk() if isinstance(node, Masked)}
    grids = {path: node for path, node in form.walk() if isinstance(node, Affine)}
    for path, name, stored in leaves(form, site):
        dense = plain[path]
        if not isinstance(dense, Dense):
            raise FormatError(f"{name}: a leaf that is no array")
        parent = path.rpartition(".")[0]
        keep, scale = None, None
        if isinstance(stored, Coded) and stored.kept:
            above = [at for at in masks if at == "" or path.startswith(f"{at}.")]
            at = f"{above[0]}.keep" if above and above[0] else "keep"
            alone = len(above) == 1 and isinstance(plain.get(at), Dense)
            keep = f"{site}:{at}" if alone else ""
        if parent in grids and path.endswith("codes") and not grids[parent].group:
            scale = grids[parent].scale.decode()
        yield name, Leaf(stored, dense.array, keep, scale)
