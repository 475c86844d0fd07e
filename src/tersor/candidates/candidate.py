"""Candidate: a model that is exported, scored or compared: a file, or the model itself.

base           the model as its code gives it
FILE.tersor    a compressed file, decoded into the model
FILE.onnx      a runtime's file: it runs there and needs no code
FILE.pt2       a program of torch.export: the model itself, and its code
another file   a checkpoint: .safetensors, a saved state dict, a folder of shards
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tersor.core.state import State, start
from tersor.errors import SettingError, StorageError
from tersor.io.container import load
from tersor.io.folder import read_from
from tersor.measure.nbytes import file_nbytes
from tersor.model.changed_copy import own_copy
from tersor.pipeline import plain_nbytes
from tersor.resolve import put_in
from tersor.runtimes import check_runtime
from tersor.runtimes import runtime as runtime_named
from tersor.runtimes.as_module import SessionModule
from tersor.runtimes.onnx_files import files_of
from tersor.zoo.words import PROGRAM, network_of

BASE = "base"  # the word for the model itself
ONNX = ".onnx"


@dataclass(frozen=True, repr=False)
class Candidate:
    """A model that runs on a task's batches."""

    name: str  # as it was given
    kind: str  # "model", "tersor", "checkpoint", or the runtime that runs it
    # Of the file with all that belongs to it. Of a model, or of one network of a checkpoint that holds more,
    # such as an optimizer: of its tensors in safetensors.
    nbytes: int
    module: nn.Module  # that runs it
    state: State | None = None  # None for a runtime's file
    path: Path | None = None  # None for the word base
    alone: bool = False  # the file holds more than its tensors

    @property
    def facts(self) -> dict[str, str | int]:
        """Its name, kind and bytes, as JSON; alone: the bytes of its tensors, since the file holds more."""
        found: dict[str, str | int] = {"name": self.name, "kind": self.kind, "nbytes": self.nbytes}
        return found | ({"alone": True} if self.alone else {})


def candidate(
    text: str, model: str | nn.Module | None = None, *, key: str | None = None,
    runtime: str = "onnxruntime", threads: int | None = None, who: str = "candidate",
    option: str = "--model",
) -> Candidate:  # fmt: skip
    """The candidate that `text` names: "base", or a .tersor, .onnx, .pt2 or checkpoint file.

    `model`: the code of what is not a runtime's file, as a module or in words (file.py:factory); a module is
    not changed. `key`: the network under this key, of a checkpoint with several. `runtime` runs an .onnx file
    on `threads` threads (None: as many as PyTorch uses). `who` and `option` are for messages. SettingError
    for a missing `model`, StorageError and FormatError for the file; SiteError and RefusedError for
    one that does not fit the model.
    """
    path = Path(text)
    if key is not None and not weights_alone(text):
        raise SettingError(
            f"{who}: --key {key} is for a checkpoint with several networks, and not for {text}"
        )
    if text != BASE and not path.exists():
        raise StorageError(
            f"{text}: no such file. Give a .tersor, .onnx or .pt2 file, a checkpoint or {BASE!r}"
        )
    if path.suffix == PROGRAM:
        if model is not None:
            raise SettingError(f"{who}: {without_code(text, runtime)}; leave out {option}")
        state = start(network_of(text))
        return Candidate(text, "model", plain_nbytes(state), state.model(), state, path)
    if not needs_code(text):
        check_runtime(runtime, who)
        if model is not None:
            raise SettingError(f"{who}: {without_code(text, runtime)}; leave out {option}")
        session = runtime_named(runtime).open(path, threads=threads or torch.get_num_threads())
        return Candidate(
            text, runtime, file_nbytes(*files_of(path)), SessionModule(session, text), None, path
        )
    if model is None:
        what = "is the model itself. Give its" if text == BASE else "holds weights, not code. Give the"
        raise SettingError(f"{who}: {text} {what} code too: {option} file.py:factory")
    module = network_of(model) if isinstance(model, str) else model
    if text == BASE:
        state = start(module)
        return Candidate(text, "model", plain_nbytes(state), state.model(), state)
    if path.suffix == ".tersor":
        state = load(path).on(module)
        return Candidate(text, "tersor", file_nbytes(path), state.model(), state, path)
    module = own_copy(module)  # it may be an object of the user's file, for the other candidate too
    more = put_in(module, text, key)
    state = start(module)
    nbytes = plain_nbytes(state) if more else file_nbytes(*read_from(path))
    return Candidate(text, "checkpoint", nbytes, state.model(), state, path, more)


def pair(
    a: str, b: str, model: str | nn.Module | None = None, model_b: str | nn.Module | None = None, *,
    key: str | None = None, runtime: str = "onnxruntime",
) -> tuple[Candidate, Candidate]:  # fmt: skip
    """The two candidates of a comparison. `model` is the code of both, `model_b` that of B if it differs;
    without them a program A is the code of B.
    Errors as in candidate(), and SettingError for code or a key that neither needs."""
    if model is None and Path(a).suffix == PROGRAM:
        model = a if model_b is None and needs_code(b) else None
    given = {"--model": model, "--model-b": model_b}
    options = ("--model", "--model" if model_b is None else "--model-b")
    needed = {option for text, option in zip((a, b), options, strict=True) if needs_code(text)}
    for option, code in given.items():
        if code is not None and option not in needed:
            raise SettingError(f"compare: {without_code(b, runtime)}; leave out {option}")
    keyed = [text for text in (a, b) if weights_alone(text)] or [a, b]
    first, second = (
        candidate(
            text, given[option] if needs_code(text) else None, key=key if text in keyed else None,
            runtime=runtime, who="compare", option=option,
        )
        for text, option in zip((a, b), options, strict=True)
    )  # fmt: skip
    return first, second


def needs_code(text: str) -> bool:
    """Whether `text` names weights, or the model itself by the word."""
    return text == BASE or Path(text).suffix not in (ONNX, PROGRAM)


def without_code(text: str, runtime: str) -> str:
    what = "is a program" if Path(text).suffix == PROGRAM else f"runs in {runtime}"
    return f"{text} {what} and needs no code"


def weights_alone(text: str) -> bool:
    """Whether `text` names a checkpoint."""
    return text != BASE and Path(text).suffix not in (".tersor", ONNX, PROGRAM)
