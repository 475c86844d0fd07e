"""Patch: the next file from the earlier one and what io/delta.py told of it. docs/format.md section 12."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tersor.core.view import Watch
from tersor.errors import FormatError, RefusedError
from tersor.files import atomic
from tersor.forms import FORMS, Coded, coded
from tersor.forms.flat import unflatten
from tersor.forms.form import as_bytes
from tersor.io.change import SUBTRACT, fitted, known, rebuild
from tersor.io.container import Builder
from tersor.io.delta import NUMBER, PROFILES, STREAMS, TEXT, regrid
from tersor.io.document import aliases_from_json, ledger_from_json, of_type, site_from_json
from tersor.io.header import Slot, check_shape, natural, parse_header
from tersor.io.parts import Parts
from tersor.io.tensors import CHUNK, TensorFile, TensorWriter
from tersor.io.text import inflate, parse
from tersor.io.trees import Places
from tersor.io.validate import limit_for


def patch(
    old: str | os.PathLike[str], changes: str | os.PathLike[str], out: str | os.PathLike[str],
    *, watch: Watch | None = None,
) -> int:  # fmt: skip
    """Write the file that OLD became, of the very bytes it had, and return their number.

    RefusedError where OLD is not the file that the patch was made for; FormatError where the patch is damaged.
    """
    with Parts(old) as before, TensorFile(changes) as file:
        told = Told(file, before)
        if told.text["old"] != before.digest():
            raise RefusedError(
                f"{before.path}: the patch {changes} was made for another file: one with the SHA-256 "
                f"{told.text['old'][:16]}..., and this one has {before.digest()[:16]}... Give the file that diff was "
                "given as OLD"
            )
        with told.naming(), atomic(out) as target:
            nbytes = WRITERS[told.kind](told, target, Path(out).parent, watch or Watch())
            if "new" in told.text:
                target.flush()
                check_written(target, told.text["new"], told.path)
        return nbytes


def check_written(target: BinaryIO, digest: str, path: Path) -> None:
    target.seek(0)
    sha = hashlib.sha256()
    while piece := target.read(CHUNK):
        sha.update(piece)
    if sha.hexdigest() != digest:
        raise FormatError(
            "what it makes is not the file it was made from: it is damaged, or another version of tersor wrote it"
        )


class Told:
    """An open patch."""

    def __init__(self, file: TensorFile, before: Parts) -> None:
        self.path, self.file, self.before = file.path, file, before
        self.cache: tuple[str, dict[str, Tensor]] = ("", {})
        with self.naming():
            number, slots = file.metadata.get("tersor-patch"), file.slots
            if number is None or TEXT not in slots or STREAMS not in slots:
                raise FormatError("it is no patch of tersor. Make one: tersor diff OLD NEW -o PATCH")
            if number != str(NUMBER):
                raise FormatError(
                    f"it has format {number[:20]}; this version reads {NUMBER}. A newer one may read it"
                )
            size = natural(file.metadata.get("size", ""))
            if size is None:
                raise FormatError("its metadata does not tell the size of its text")
            raw, _ = inflate(file.bytes(slots[TEXT].begin, slots[TEXT].end), size)
            self.check_sum(raw)
            self.text = of_type(parse(raw, "its text"), dict, "its text")
            self.kind = self.text.get("kind")
            if self.kind not in WRITERS or type(self.text.get("old")) is not str:
                raise FormatError(f"its kind is {str(self.kind)[:20]!r}; known are {', '.join(WRITERS)}")
            self.parts = of_type(self.text.get("parts"), dict, "its parts")
            self.at: dict[str, tuple[int, list[int]]] = {}
            begin = slots[STREAMS].begin
            for name, part in self.parts.items():
                lengths = of_type(of_type(part, dict, name).get("n", []), list, f"{name}: n")
                if not all(type(n) is int and n >= 0 for n in lengths):
                    raise FormatError(f"{name}: its streams have lengths {str(lengths)[:60]}")
                self.at[name] = begin, lengths
                begin += sum(lengths)
            if begin != slots[STREAMS].end:
                raise FormatError("its streams are not as long as its text tells")

    def check_sum(self, raw: bytes) -> None:
        slot, crc = self.file.slots[STREAMS], 0
        for begin in range(slot.begin, slot.end, CHUNK):
            crc = zlib.crc32(self.file.bytes(begin, min(begin + CHUNK, slot.end)), crc)
        if self.file.metadata.get("crc") != f"{zlib.crc32(raw):08x}{crc:08x}":
            raise FormatError("it is damaged: its bytes do not have the CRC that the metadata tells")

    @contextmanager
    def naming(self) -> Iterator[None]:
        try:
            yield
        except FormatError as error:
            said = str(error)
            raise FormatError(said if said.startswith(str(self.path)) else f"{self.path}: {said}") from None

    def array(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], keep: Tensor | None = None
    ) -> Tensor:
        """An array of the new file."""
        part = self.parts.get(name)
        if part is None:
            raise FormatError(f"{name[:200]}: the patch does not tell it")
        try:
            found = self._array(name, part, dtype, shape, keep)
        except FormatError as error:
            raise FormatError(f"{name[:200]}: {error}") from None
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise FormatError(
                f"{name[:200]}: it is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}"
            )
        return found

    def _array(
        self, name: str, part: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], keep: Tensor | None
    ) -> Tensor:
        other = part.get("of") or name
        if "how" in part and other not in self.before.known:
            raise FormatError(f"it is told by {str(other)[:100]!r}, which the old file does not have")
        if part.get("how") == "same":
            return self.before.array(other)
        base = (
            fitted(self.before.array(other), shape, dtype)
            if "how" in part
            else torch.zeros(shape, dtype=dtype)
        )
        if base is None:
            raise FormatError(f"{other} of the old file has another dtype or other axes")
        if "grid" in part:
            ratio = torch.tensor(part["grid"], dtype=torch.float32)
            if dtype not in (torch.int8, torch.int16) or ratio.numel() not in (1, shape[0] if shape else 1):
                raise FormatError("a grid that moved, but not for its codes")
            base = regrid(base, ratio)
        at, lengths = self.at[name]
        ends = np.cumsum([at, *lengths]).tolist()
        streams = [self.file.bytes(a, b) for a, b in zip(ends, ends[1:], strict=False)]
        how = part.get("how", part.get("alone", SUBTRACT))
        return rebuild(str(how), streams, base, keep)


def write_tersor(told: Told, target: BinaryIO, folder: Path, watch: Watch) -> int:
    """Forms as they were, written by the writer of all .tersor files."""
    document = of_type(told.text.get("text"), dict, "its text of the new file")
    tiny = bool(told.text.get("tiny"))
    large = {}
    for name, entry in of_type(told.text.get("large"), dict, "large").items():
        dtype, shape = known(str(entry[0])), check_shape(entry[1], name)
        large[name] = Slot(dtype, shape, 0, math.prod(shape) * dtype.itemsize)
    places, digests, sites, trees = Places(large), {}, {}, {}
    for name, said in of_type(document.get("sites"), dict, "sites").items():
        sites[name], digests[name], tree = site_from_json(name, said, tiny=tiny)
        trees[name] = places.full(tree, sites[name].shape, sites[name].dtype, name)
    declared = sum(math.prod(site.shape) for site in sites.values())
    if declared > limit_for(told.file.nbytes + told.before.path.stat().st_size):
        raise FormatError(f"it declares {declared:,} elements, more than its bytes justify")
    with TensorWriter(folder) as tensors:
        builder = Builder(tensors, tiny=tiny)
        for number, (name, site) in enumerate(sites.items(), 1):
            leaves = Leaves(told, places, trees[name], name)
            builder.add(site, unflatten(trees[name], name, leaves.stored, FORMS))
            watch.progress(number, len(sites), name)
        ledger = ledger_from_json(document, digests)
        return builder.finish(target, aliases_from_json(document.get("aliases", {}), sites), ledger)


class Leaves:
    """The leaves of one site, as they are stored."""

    def __init__(self, told: Told, places: Places, tree: Mapping[str, Any], site: str) -> None:
        self.told, self.places = told, places
        self.nodes = dict(coded_nodes(tree, site, ""))
        self.masks: dict[str, Tensor] = {}

    def stored(self, name: str) -> Tensor:
        node = self.nodes.get(name)
        part = self.told.parts.get(name, {})
        if node is None or "coder" not in part:
            place = self.places.found[name]
            found = self.told.array(name, place.dtype, place.shape)
            self.masks[name] = found
            return found
        if part["coder"] not in PROFILES:
            raise FormatError(
                f"{name[:200]}: coder {str(part['coder'])[:20]!r}; known are {', '.join(PROFILES)}"
            )
        keep = None
        if "keep" in part:
            keep = self.masks.get(str(part["keep"]))
            if keep is None or list(keep.shape) != list(node["size"]) or keep.dtype is not torch.bool:
                raise FormatError(
                    f"{name[:200]}: its mask {str(part['keep'])[:100]!r} does not come before it"
                )
        array = self.told.array(name, known(str(node["dtype"])), tuple(node["size"]), keep)
        self.masks[name] = array
        again = coded(array, keep, part["coder"])
        if list(again.planes) != list(node["planes"]):
            raise FormatError(
                f"{name[:200]}: this version of tersor codes it otherwise; use the one that made the patch"
            )
        return again.data


def coded_nodes(node: Any, site: str, path: str) -> Iterator[tuple[str, Any]]:
    """(name of its leaf, node) of each coded leaf in a tree."""
    if isinstance(node, dict):
        if node.get("form") == Coded.name:
            yield (f"{site}:{path}" if path else site), node
        for key, child in node.items():
            yield from coded_nodes(child, site, f"{path}.{key}" if path else key)


def write_safetensors(told: Told, target: BinaryIO, folder: Path, watch: Watch) -> int:
    """The header as it was, and the tensors in its order."""
    head = of_type(told.text.get("head"), str, "its header of the new file").encode()
    sizes = of_type(parse(head, "its header of the new file"), dict, "its header of the new file")
    room = max(
        (entry["data_offsets"][1] for name, entry in sizes.items() if name != "__metadata__"), default=0
    )
    slots, _ = parse_header(head, room)
    target.write(len(head).to_bytes(8, "little") + head)
    ordered = sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end))
    for number, (name, slot) in enumerate(ordered, 1):
        target.write(as_bytes(told.array(name, slot.dtype, slot.shape)).data)
        watch.progress(number, len(ordered), name)
    return 8 + len(head) + room


def write_tensors(told: Told, target: BinaryIO, folder: Path, watch: Watch) -> int:
    """A .safetensors file of the tensors of a checkpoint of another kind."""
    listed = of_type(told.text.get("tensors"), list, "tensors")
    with TensorWriter(folder) as tensors:
        for number, (name, dtype, shape) in enumerate(listed, 1):
            tensors.add(name, told.array(name, known(str(dtype)), check_shape(shape, str(name))))
            watch.progress(number, len(listed), name)
        for alias, name in of_type(told.text.get("aliases", {}), dict, "aliases").items():
            tensors.also(alias, name)
        return tensors.finish(target, {})


WRITERS = {"tersor": write_tersor, "safetensors": write_safetensors, "tensors": write_tensors}
