"""Journal: a run on disk, so that one that is killed at any moment goes on where it was.

DIR/head.json            fingerprints of model, data and recipe: a changed one is refused
DIR/000001.safetensors   one applied group: the forms after it as tensors, its events as JSON in the metadata
DIR/training-0-1...      the first training of step 0 as of its last epoch: leaves, optimizer, random state
Every file is written under another name and moved into place, so each is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tersor.core.step import Edit, Group, Note
from tersor.errors import FormatError, JournalError
from tersor.files import atomic, write_text
from tersor.forms import FORMS, Form
from tersor.forms.flat import flatten, unflatten

NUMBER = 1


@dataclass(frozen=True)
class Line:
    """One journaled group; `end` marks that its step is finished."""

    step: int
    events: tuple[dict[str, Any], ...]
    forms: Mapping[str, Form]  # after the edits, by site
    end: bool = False

    def group(self, state: Mapping[str, Form]) -> Group:
        """The events again, as edits of `state`."""
        events: list[Edit | Note] = []
        for event in self.events:
            site = event["site"]
            if "how" in event:
                events.append(Edit(site, state[site], self.forms[site], event["how"]))
            else:
                events.append(Note(site, event["kind"], event["text"], event["data"]))
        return tuple(events)


class Journal:
    """The journal of one run in a folder of its own."""

    def __init__(
        self, folder: str | Path, fingerprints: Mapping[str, str], *, resume: bool, writes: bool = True
    ):
        """Begin in an empty folder, or with `resume` go on with what is there. With `writes` False nothing is
        written: the other processes of one training read along.

        Raises JournalError where there is a journal and `resume` is not asked for, or where model, data or
        recipe are not the ones that the journal began with.
        """
        self.folder, self.writes = Path(folder), writes
        head = self.folder / "head.json"
        self.lines: list[Line] = []  # of the run that is resumed; what this run adds is on disk only
        if head.exists() and resume:
            self.same(head, fingerprints)
            count = len(list(self.folder.glob("[0-9]*.safetensors")))
            self.lines = [self._read(self._path(number)) for number in range(1, count + 1)]
        elif head.exists() and writes and any(self.folder.glob("*.safetensors")):  # or nothing would be lost
            raise JournalError(
                f"{self.folder} holds the journal of an earlier run. Go on with --resume (resume=True), "
                f"or remove the folder to begin anew."
            )
        elif writes:
            write_text(head, json.dumps({"tersor journal": NUMBER, **fingerprints}, indent=1) + "\n")
        self.count = len(self.lines)

    def same(self, path: Path, fingerprints: Mapping[str, str]) -> None:
        """Refuse a journal that another run began."""
        try:
            head = json.loads(path.read_bytes())
            number = head["tersor journal"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        if number != NUMBER:
            raise JournalError(f"{self.folder}: journal format {number}, this version reads {NUMBER}")
        for name, digest in fingerprints.items():
            if head.get(name) != digest:
                raise JournalError(
                    f"--resume: the {name} changed since the run in {self.folder} began "
                    f"({head.get(name)}, now "
                    f"{digest}). Give the same {name} again, or remove the folder to begin anew."
                )

    def append(self, step: int, group: Group, *, end: bool = False) -> None:
        """Keep an applied group, or the end of a step."""
        if not self.writes:
            return
        events: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for number, event in enumerate(group):
            if isinstance(event, Edit):
                tree, arrays = flatten(event.after, str(number))
                events.append({"site": event.site, "how": event.how, "tree": tree})
                tensors |= arrays
            else:
                events.append(
                    {"site": event.site, "kind": event.kind, "text": event.text, "data": dict(event.data)}
                )
        self.count += 1
        line = {"step": step, "end": end, "events": events}
        self._write(self._path(self.count), tensors, line)
        if end:
            for done in self.folder.glob("training-*.safetensors"):
                done.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], facts: Any) -> None:
        # Copies, for the format has no tensors that share memory.
        whole = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        data = safetensors.torch.save(whole, {"journal": json.dumps(facts)})
        with atomic(path) as file:
            file.write(data)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], Any]:
        if not path.exists():
            raise JournalError(f"{path} is missing. Remove the folder to begin anew.")
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["journal"])
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise damaged(path, error) from error

    def _read(self, path: Path) -> Line:
        tensors, line = self._load(path)
        forms = {}
        try:
            for number, event in enumerate(line["events"]):
                if "tree" in event:
                    forms[event["site"]] = unflatten(event["tree"], str(number), tensors.__getitem__, FORMS)
            return Line(line["step"], tuple(line["events"]), forms, line["end"])
        except (FormatError, KeyError, TypeError) as error:
            raise damaged(path, error) from error

    def training(self, step: int, part: int) -> Training:
        """Where a training inside a step is kept; a step may train more than once."""
        return Training(self, self.folder / f"training-{step}-{part}.safetensors")


def damaged(path: Path, error: Exception) -> JournalError:
    return JournalError(f"{path} is damaged ({error}). Remove the folder to begin anew.")


@dataclass(frozen=True)
class Training:
    """The checkpoint of one training; model/fit.py fills it."""

    journal: Journal
    path: Path

    def save(self, epoch: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if self.journal.writes:
            self.journal._write(self.path, tensors, {"epoch": epoch, "facts": facts})

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        if not self.path.exists():
            return None
        tensors, line = self.journal._load(self.path)
        return line["epoch"], tensors, line["facts"]
