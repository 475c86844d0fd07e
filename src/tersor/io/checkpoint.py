"""Checkpoint: read weights files one tensor at a time, so that files larger than memory can be packed.

.safetensors, a folder of them (with or without an index), .pt .pth .bin state dicts. Plain reads, no memory
map. A PyTorch file is loaded onto the meta device: its tensors have offsets in the file and no bytes. No code
in it is executed.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from tersor.boundary import no_memory
from tersor.errors import FormatError, SettingError, first_line
from tersor.forms import Dense
from tersor.io.checkpoint_weights import Chosen, NoSuchKey, NotWeights, choose, prefix_of, under
from tersor.io.folder import scan
from tersor.io.header import Slot
from tersor.io.on_disk import OnDisk
from tersor.io.pickle_claims import check_claims
from tersor.io.safetensors_file import HELD, Ranges, TensorFile, cannot_read
from tersor.io.short_header import MAGIC
from tersor.io.torch_records import DAMAGED, records_of
from tersor.model.kinds import resolved, unfit
from tersor.model.versions import Version


class CheckpointFile(Protocol):
    """One file of a checkpoint."""

    path: Path
    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]  # of a .safetensors
    versions: Mapping[str, int] | None  # of modules, which a state dict may state
    aliases: Mapping[str, str]  # other names of one tensor -> the first
    training: bool  # whether it is the state of an optimizer
    key: str  # the key that its tensors are under; "" if they are all of the file
    ignored: Mapping[str, int | None]  # parts left out, such as an optimizer -> tensors in it

    def read(self, name: str) -> Tensor: ...

    def form(self, name: str) -> Dense: ...

    def close(self) -> None: ...


class Part(NamedTuple):
    """One file of a checkpoint, and the tensors that it holds under any name."""

    name: str
    metadata: Mapping[str, str]  # of a .safetensors
    names: tuple[str, ...]


class Checkpoint:
    """A file or a folder of weights. Names, dtypes and shapes are read on opening, values one by one. `key`:
    only the tensors under it, with the names below it."""

    def __init__(self, path: str | os.PathLike[str], key: str | None = None) -> None:
        self.path, self.key = Path(path), ""
        self.where: dict[str, CheckpointFile] = {}
        self.full: dict[str, str] = {}  # name -> its name in the file, if prefixes were stripped
        self.slots: dict[str, Slot] = {}
        self.aliases: dict[str, str] = {}
        self.ignored: dict[str, int | None] = {}  # None: a file that was not opened
        self.reasons: dict[str, str] = {}  # of some of the ignored
        self.files: list[Part] = []
        self.opened: list[CheckpointFile] = []  # one for each of these, also without tensors
        self.versions: dict[str, Version] | None = None  # of modules, by name; None if no file states them
        self.folder = scan(self.path) if os.path.isdir(self.path) else None
        failed: list[NoSuchKey | NotWeights] = []
        with ExitStack() as stack:
            for file, names in self._files():
                try:
                    part: Any = stack.enter_context(open_checkpoint_file(file, key))
                    if part.training and names is None and self.folder:
                        raise NotWeights(f"{file}: it is the state of an optimizer. Name the file to pack it")
                except (NoSuchKey, NotWeights) as error:
                    if isinstance(error, NotWeights) and names is not None:
                        raise
                    failed.append(error)
                    self.ignored[file.name] = None
                    self.reasons[file.name] = error.brief
                else:
                    self._add(file, part, names if key is None else None)
            if failed and not self.slots:
                raise next((error for error in failed[::-1] if isinstance(error, NoSuchKey)), failed[0])
            self._strip()
            self.parts = stack.pop_all()

    def _strip(self) -> None:
        """Take the wrappers' prefixes off the names, if all of them have these."""
        self.stripped = prefix_of([*self.slots, *self.aliases])
        if cut := len(self.stripped):
            self.full = {name[cut:]: name for name in self.slots}
            self.slots = {name[cut:]: slot for name, slot in self.slots.items()}
            self.where = {name[cut:]: part for name, part in self.where.items()}
            self.aliases = {name[cut:]: site[cut:] for name, site in self.aliases.items()}
            if self.versions is not None:
                below = {f"{name}.": number for name, number in self.versions.items()}
                self.versions = {
                    name[cut:].removesuffix("."): number
                    for name, number in below.items() if name.startswith(self.stripped)
                }  # fmt: skip

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        """(file, names that it must have) pairs; None for the names if there is no index."""
        if self.folder is None:
            return [(self.path, None)]
        self.ignored |= dict.fromkeys((*self.folder.others, *self.folder.along))
        self.reasons |= {name: why for name, why in self.folder.others.items() if why}
        return self.folder.weights

    def _add(self, file: Path, part: Any, names: set[str] | None) -> None:
        missing = (names or set()) - part.slots.keys() - part.aliases.keys()
        if missing:
            raise FormatError(f"{file}: the index says that it holds {min(missing)}, but it does not")
        double = [name for name in (*part.slots, *part.aliases) if name in self.slots or name in self.aliases]
        if double:
            raise FormatError(f"{file}: {double[0]} is in another file of {self.path} too; keep one of them")
        self.where |= dict.fromkeys(part.slots, part)
        self.slots |= part.slots
        self.aliases |= part.aliases
        self.opened.append(part)
        self.files.append(Part(file.name, part.metadata, (*part.slots, *part.aliases)))
        for name, count in part.ignored.items():
            self.ignored[name] = (self.ignored.get(name) or 0) + (count or 0)
        self.key = self.key or part.key
        if part.versions is not None:
            self.versions = (self.versions or {}) | dict(part.versions)

    @property
    def read_nbytes(self) -> int:
        """Bytes of the files that were read, the index too."""
        index = self.folder.index if self.folder else None
        opened = [file.path for file in self.opened]
        return sum(file.stat().st_size for file in (*opened, *([index] if index else [])))

    def read(self, name: str) -> Tensor:
        return self.where[name].read(self.full.get(name, name))

    def form(self, name: str) -> Dense:
        """A tensor as a dense form. A large contiguous one stays in its file."""
        return self.where[name].form(self.full.get(name, name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.parts.close()


def open_checkpoint_file(path: Path, key: str | None = None) -> SafetensorsCheckpoint | TorchCheckpoint:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise cannot_read(path, error) from None
    if head.startswith(MAGIC):
        raise packed_already(path)
    # A safetensors header's length may have the first bytes of a pickle, but a pickle has no { at byte 8.
    pickled = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:] != b"{"
    is_torch = pickled or head.startswith(b"PK\x03\x04")
    return TorchCheckpoint(path, key) if is_torch else SafetensorsCheckpoint(path, key)


class SafetensorsCheckpoint(TensorFile):
    """A safetensors file that is not a .tersor file."""

    aliases: Mapping[str, str] = {}
    ignored: Mapping[str, int | None] = {}
    versions: Mapping[str, int] | None = None
    training = False

    def __init__(self, path: Path, key: str | None = None) -> None:
        super().__init__(path)
        self.key = key or ""
        try:
            if "tersor" in self.metadata:
                raise packed_already(path)
            if key is not None:
                every, self.slots = self.slots, under(key, self.slots, path)
                self.ignored = {name: 1 for name in every if not name.startswith(f"{key}.")}
        except SettingError:
            self.close()
            raise


def packed_already(path: Path) -> SettingError:
    return SettingError(f"{path}: it is a .tersor file already. Unpack it: tersor unpack FILE -o OUT")


class TorchCheckpoint:
    """A state dict written by torch.save, or a training checkpoint that holds one."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.file = Ranges(path)
        try:
            check_claims(path)
            self.records = records_of(path)
            found = self._load(key)
            self.key, self.ignored = found.key, found.ignored
            self.versions, self.training = found.versions, found.training
            self.tensors, self.slots, self.aliases = self._sort(found.tensors)
        except (FormatError, SettingError):
            self.close()
            raise

    def _load(self, key: str | None) -> Chosen:
        """The state dict: tensors with offsets and no bytes if all offsets are known, else with bytes."""
        if self.records:
            with suppress(FormatError):
                found = choose(load_torch(self.path, "meta"), self.path, key)
                for name, tensor in found.tensors.items():
                    self._check(name, tensor)
                if all(self._record(tensor) is not None for tensor in found.tensors.values()):
                    return found
        self.records = {}
        return choose(load_torch(self.path, "cpu"), self.path, key)

    def _check(self, name: str, tensor: Any) -> None:
        """Refuse a tensor that a .tersor file cannot hold."""
        if why := unfit(tensor, meta=bool(self.records)):
            raise FormatError(f"{self.path}: {name} is {why}")

    def _record(self, tensor: Tensor) -> int | None:
        """The offset in the file of a meta tensor's storage; None if it is not certain."""
        storage = tensor.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)
        return begin if begin in self.records and self.records[begin] >= int(storage.nbytes()) else None

    def _sort(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Slot], dict[str, str]]:
        """(tensors, slots, aliases). Equal views of the same memory become one tensor with aliases."""
        own, slots, aliases = {}, {}, {}
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in tensors.items():
            self._check(name, tensor)
            place = self._place(tensor)
            seen = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
            key = (*place, *seen) if tensor.numel() else (name,)
            if first.setdefault(key, name) != name:
                aliases[name] = first[key]
                continue
            own[name], slots[name] = tensor, Slot(tensor.dtype, tuple(tensor.shape), *place)
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise FormatError(
                    f"{self.path}: {name}: some of its elements share memory. Save a copy: x.contiguous()"
                )
        return own, slots, aliases

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """The byte range of a tensor's elements, in the file or in memory."""
        storage, size = tensor.untyped_storage(), tensor.dtype.itemsize
        start = (self._record(tensor) if self.records else storage.data_ptr()) or 0
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        begin = int(tensor.storage_offset()) * size
        end = begin + (int(reach) * size if tensor.numel() else 0)
        if not 0 <= begin <= end <= int(storage.nbytes()):
            raise FormatError(f"{self.path}: a tensor reaches beyond its storage: the file is damaged")
        return start + begin, start + end

    def read(self, name: str) -> Tensor:
        tensor, slot = self.tensors[name], self.slots[name]
        if not self.records:
            return resolved(tensor.detach().clone()).contiguous()
        data = self.file.read(slot.begin, slot.end).view(slot.dtype)
        if not len(data):
            return data.reshape(slot.shape)
        data = data.as_strided(slot.shape, tensor.stride()).contiguous()
        data = data.conj() if tensor.is_conj() else data
        return resolved(torch._neg_view(data) if tensor.is_neg() else data)

    def form(self, name: str) -> Dense:
        slot = self.slots[name]
        tensor = self.tensors[name]
        marked = tensor.is_conj() or tensor.is_neg()
        if not self.records or slot.nbytes <= HELD or marked or not tensor.is_contiguous():
            return Dense(self.read(name))
        return OnDisk(slot.dtype, slot.shape, partial(self.file.elements, name, slot))

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_torch(path: Path, device: str) -> Any:
    """Load a torch.save file without executing code in it. With device "meta" tensors have no bytes."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:Unsupported|disallowed) \w+: GLOBAL ([\w.]+)|GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1] or found[2]})" if found else ""
        raise NotWeights(
            f"{path}: it holds Python objects{what}, and loading them would run code from the file. "
            f"Save only its tensors, where the model is: torch.save(model.state_dict(), 'weights.pt')"
        ) from None
    except DAMAGED as error:
        if no_memory(error):
            raise
        if "TorchScript" in str(error):
            raise NotWeights(
                f"{path}: it is a TorchScript archive (torch.jit.save), which holds code. Load it and save "
                f"only its tensors: torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        reason = first_line(error)[:200]
        raise FormatError(f"{path}: it cannot be read as a PyTorch checkpoint: {reason}") from None
