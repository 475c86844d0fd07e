"""Journal: a run on disk. A run killed at any moment resumes from it; undo and replay read past forms.

DIR/head.json           fingerprints of model, data, code, recipe and threads; a resume checks them
DIR/000001.group        one applied group: its forms as tensors, its events as JSON in the metadata
DIR/training-0-1.group  the first training of step 0 after its last epoch: leaves, optimizer, random state
DIR/lock                locked while a run writes here
A group file is a SHA-256 (32 bytes), then safetensors. The hash covers the previous file's hash and the bytes
after it, so it detects a changed bit and a file that is missing, moved or from another run. Each file is
written under a temporary name and moved into place, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
from torch import Tensor

from tersor.errors import FormatError, JournalError
from tersor.files import LOCKED, atomic, claim, write_text
from tersor.forms import NODES
from tersor.forms.form import DIGEST
from tersor.model.changes import Replace, Set
from tersor.record.events import CURRENT, Cut, Edit, Event, Group, Note
from tersor.record.node_json import flatten, unflatten

NUMBER = 2
HASH = 32  # bytes
WEIGHTS = " If its function makes random weights, give them: --weights FILE, or seed it"
PLAIN = {"cut": Cut, "set": Set, "replace": Replace, "note": Note}  # events without tensors


@dataclass(frozen=True)
class Line:
    """One journaled group. If `seconds` is set, it is the last of its step. Its tensors stay on disk."""

    step: int
    key: str
    proof: str
    seconds: float | None
    events: tuple[dict[str, Any], ...]
    path: Path

    def group(self) -> Group:
        """The group, read from disk. Its edits apply to the current forms."""
        try:
            tensors = safetensors.torch.load(self.path.read_bytes()[HASH:])
            return Group(self.key, tuple(self._events(tensors)), self.proof)
        except (safetensors.SafetensorError, FormatError, OSError, LookupError, TypeError) as error:
            raise damaged(self.path, error) from error

    def _events(self, tensors: Mapping[str, Tensor]) -> Iterator[Event]:
        for number, event in enumerate(self.events):
            ((word, fields),) = event.items()
            if word == "edit":
                after = unflatten(fields["tree"], str(number), tensors.__getitem__, NODES)
                yield Edit(fields["site"], CURRENT, after, fields["how"])
            else:
                fields = {**fields, "kept": tuple(fields["kept"])} if word == "cut" else fields
                yield PLAIN[word](**fields)


class Journal:
    """The journal of one run, in its own folder. A context manager: it holds a lock on the folder."""

    def __init__(
        self, folder: str | Path, fingerprints: Mapping[str, Any], *, resume: bool, writes: bool = True
    ):
        """Start in an empty folder, or with `resume` continue the journal in it. With `writes` False nothing
        is written: in a distributed training only process 0 writes, the others read.

        JournalError if another run writes here, if there is a journal and `resume` is False, or if a
        fingerprint differs from the one in the journal.
        """
        self.folder, self.writes = Path(folder), writes
        head = self.folder / "head.json"
        self.lines: list[Line] = []  # of the resumed run; groups that this run adds are on disk only
        self.lock: IO[bytes] | None = claim(self.folder / LOCKED) if writes else None
        with ExitStack() as stack:
            stack.callback(self.close)  # on an error; pop_all() below cancels it
            if head.exists() and resume:
                self.chain = self._checked_head(head, fingerprints)
                self.started = self.chain
                for number in range(1, len(list(self.folder.glob("[0-9]*.group"))) + 1):
                    self.lines.append(self._read(self._path(number)))
            elif writes and (any(self.folder.glob("*.group")) or any(self.folder.glob("trial-*"))):
                if resume:
                    raise JournalError(f"{head} is missing. Remove {self.folder} to start again.")
                raise JournalError(
                    f"{self.folder} holds the journal of an earlier run. Resume it with --resume "
                    f"(resume=True), or remove that folder to start again."
                )
            else:
                text = json.dumps({"tersor journal": NUMBER, **fingerprints}, indent=1) + "\n"
                self.chain = hashlib.sha256(text.encode()).digest()
                self.started = self.chain
                if writes:
                    write_text(head, text)
            stack.pop_all()
        self.count = len(self.lines)

    @property
    def root(self) -> str:
        """Identifies this run's journal: a digest of its head."""
        return hashlib.sha256((self.folder / "head.json").read_bytes()).hexdigest()[:DIGEST]

    def _checked_head(self, path: Path, fingerprints: Mapping[str, Any]) -> bytes:
        """The hash of the head. JournalError if a fingerprint differs."""
        try:
            raw = path.read_bytes()
            head = json.loads(raw)
            number = head["tersor journal"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        if number != NUMBER:
            raise JournalError(f"{self.folder}: journal format {number}, this version reads {NUMBER}")
        for name, value in fingerprints.items():
            if head.get(name) != value:
                raise JournalError(
                    f"--resume: the {name} changed since the run in {self.folder} began "
                    f"({head.get(name)}, now {value}). Use the same {name}, or remove that folder to "
                    f"start again.{WEIGHTS if name == 'model' else ''}"
                )
        return hashlib.sha256(raw).digest()

    def append(self, step: int, group: Group, *, seconds: float | None = None) -> None:
        """Store an applied group. `seconds`: what its step took, given with the last group of the step."""
        if not self.writes:
            return
        events: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for number, event in enumerate(group.events):
            if isinstance(event, Edit):
                tree, arrays = flatten(event.after, str(number))
                events.append({"edit": {"site": event.site, "how": event.how, "tree": tree}})
                tensors |= arrays
            else:
                word = next(word for word, kind in PLAIN.items() if isinstance(event, kind))
                events.append({word: {key: plain(value) for key, value in vars(event).items()}})
        self.count += 1
        line = {"step": step, "key": group.key, "proof": group.proof, "seconds": seconds, "events": events}
        self.chain = self._write(self._path(self.count), tensors, line, self.chain)
        if seconds is not None:
            self.started = self.chain
            for done in self.folder.glob("training-*.group"):
                done.unlink()
            for done in self.folder.glob("trial-*"):
                shutil.rmtree(done)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.group"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], facts: Any, behind: bytes) -> bytes:
        """Write a file that follows one with the hash `behind`. Returns its own hash."""
        # Copies, since safetensors refuses tensors that share memory.
        whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        data = safetensors.torch.save(whole, {"journal": json.dumps(facts)})
        found = hashlib.sha256(behind + data).digest()
        with atomic(path) as file:
            file.write(found + data)
        return found

    def _load(self, path: Path, behind: bytes) -> tuple[bytes, Any, bytes]:
        """(hash, facts, safetensors) of a file that must follow one with the hash `behind`."""
        if not path.exists():
            raise JournalError(f"{path} is missing. Remove {path.parent} to start again.")
        raw = path.read_bytes()
        found, data = raw[:HASH], raw[HASH:]
        if hashlib.sha256(behind + data).digest() != found:
            raise damaged(path, "its bytes, or those of an earlier file, changed after they were written")
        try:
            size = int.from_bytes(data[:8], "little")
            return found, json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["journal"]), data
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, error) from error

    def _read(self, path: Path) -> Line:
        self.chain, facts = self._load(path, self.chain)[:2]
        try:
            step, key, proof, seconds, events = (
                facts[word] for word in ("step", "key", "proof", "seconds", "events")
            )
            self.started = self.chain if seconds is not None else self.started
            return Line(step, key, proof, seconds, tuple(events), path)
        except (KeyError, TypeError) as error:
            raise damaged(path, error) from error

    def training(self, step: str, part: str) -> Training:
        """The checkpoint of one training of a step; a step may train more than once. Its hash covers that of
        the last group before the step, since groups of the step may be added between epochs."""
        return Training(self, self.folder / f"training-{step}-{part}.group")

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def damaged(path: Path, why: object) -> JournalError:
    return JournalError(f"{path} is damaged ({why}). Remove {path.parent} to start again.")


def lines_of(folder: str | Path) -> list[Line]:
    """The groups of a journal, in order. undo and replay rebuild states from them."""
    path = Path(folder) / "head.json"
    if not path.exists():
        raise JournalError(f"{folder} holds no journal: it has no {path.name}")
    with Journal(folder, {}, resume=True, writes=False) as journal:
        return journal.lines


@dataclass(frozen=True)
class Training:
    """The checkpoint of one training; model/training_loop.py writes it."""

    journal: Journal
    path: Path

    def save(self, epoch: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if self.journal.writes:
            self.journal._write(self.path, tensors, {"epoch": epoch, "facts": facts}, self.journal.started)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        if not self.path.exists():
            return None
        _, line, data = self.journal._load(self.path, self.journal.started)
        return line["epoch"], safetensors.torch.load(data), line["facts"]
