"""Folder: what a folder of weights holds: its weights, the files that go with them, and the rest.

weights      the files of the index; else all *.safetensors at its top, else *.bin, *.pt or *.pth
go along     configuration, tokenizer, licence: small text files, and tokenizers of any kind up to 64 MiB
left out     the rest, by name: training state, other formats, code, hidden files, links that lead out of it
A folder with weights below this one is another checkpoint: nothing in it goes along.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tersor.errors import FormatError
from tersor.io.document import attachment_name
from tersor.io.json_text import parse
from tersor.io.safetensors_file import cannot_read

FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")  # in a folder: the first of these that matches
# Files that a training saves beside its weights. Numbers of a process or a step may follow: rng_state_0.pth.
BESIDE = re.compile(
    r"(optim|optimizer|scheduler|scaler|sampler|rng_state|random_states?|training_args|trainer_state)"
    r"(\b|_?\d)"
)
INDEX = ".index.json"
SUFFIX = ".safetensors"
TEXT = (
    ".json", ".txt", ".md", ".yaml", ".yml", ".jinja", ".model", ".spm", ".tiktoken", ".bpe", ".codes",
    ".vocab",
)  # fmt: skip
TOKENIZER = re.compile(r"(tokenizer|vocab|merges)[^/]*\.(json|txt)$|.*\.(model|spm|tiktoken|bpe)$")
RESERVED = re.compile(
    r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3]) *(\.|$)", re.IGNORECASE
)
LICENCE = re.compile(r"(licen[cs]e|notice)$", re.IGNORECASE)
SMALL = 1 << 20  # bytes up to which any text file goes along
LARGEST = 64 << 20  # bytes of a tokenizer's file
MOST, TOTAL = 256, 256 << 20  # files that go along, and their bytes


@dataclass
class Folder:
    """The files of a folder, by their paths in it with slashes."""

    path: Path
    index: Path | None = None
    weights: list[tuple[Path, set[str] | None]] = field(default_factory=list)  # with the names it must have
    along: dict[str, Path] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)  # -> why; "" for a file that was not looked at

    @property
    def read(self) -> list[Path]:
        """The index and the files with the weights."""
        return [*([self.index] if self.index else []), *(file for file, _ in self.weights)]


def scan(path: Path) -> Folder:
    """Sort the files of a folder. Nothing is opened but the index. FormatError if there are no weights."""
    found = Folder(path)
    files: dict[str, Path] = {}
    inner: set[str] = set()  # folders below that have weights of their own
    for name, file in walk(path, found.others):
        if not file.is_file():  # a pipe would be waited for without end; a link may lead nowhere
            found.others[name] = "a link to nothing" if file.is_symlink() else "no regular file"
            continue
        files[name] = file
        if "/" in name and is_kind(file):
            inner.add(name.rpartition("/")[0])
    top = [file for name, file in files.items() if "/" not in name]
    found.index, listed = index_of(path, top)
    found.weights = sorted(listed.items()) if listed else [(file, None) for file in loose(top)]
    if not found.weights:
        raise FormatError(f"{path}: the folder holds no weights; known are {', '.join(FILES)}")
    taken = set(found.read)
    kinds = {file.suffix for file, _ in found.weights}
    # Names in use: of the weights, also as `unpack` writes them, and of the files that go along.
    names = {folded(name) for file in taken for name in (file.name, renamed(file.name))}
    folders: set[str] = set()  # that they are in
    nbytes = 0
    for name, file in files.items():
        if file in taken:
            continue
        why = refused(name, file, path, inner)
        if found.index and file.parent == path and file.suffix in kinds and not BESIDE.match(name):
            why = "not in the index"
        key = folded(name)
        parents = {key[:at] for at, letter in enumerate(key) if letter == "/"}
        if why is None and (key in names | folders or parents & names):
            why = "another file has its name, but for capitals or the coding of accents"
        if why is None:
            nbytes += (size := file.stat().st_size)
            why = "too much goes along already" if nbytes > TOTAL or len(found.along) >= MOST else None
            nbytes -= size if why else 0
        if why is None:
            found.along[name] = file
            names.add(key)
            folders |= parents
        else:
            found.others[name] = why
    return found


def walk(path: Path, others: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of each file, in a fixed order. Hidden and linked folders are not entered, and named in
    `others`; so are hidden files."""
    for folder, inside, files in os.walk(path):
        inside.sort()
        here = Path(folder)
        for word in list(inside):
            if word.startswith(".") or (here / word).is_symlink():
                inside.remove(word)
                why = "a hidden folder" if word.startswith(".") else "a linked folder"
                others[f"{relative(here / word, path)}/"] = why
        for word in sorted(files):
            name = relative(here / word, path)
            if word.startswith("."):
                others[name] = "hidden"
            else:
                yield name, here / word


def relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def index_of(path: Path, top: Iterable[Path]) -> tuple[Path | None, dict[Path, set[str]]]:
    """(the index of the shards, its files with the names of their tensors). Of several the one of
    .safetensors. That of a .bin whose shards were not downloaded does not hide a .safetensors."""
    top = list(top)
    indexes = [file for file in top if file.name.endswith(INDEX)]
    preferred = [file for file in indexes if file.name.endswith(f".safetensors{INDEX}")]
    indexes = preferred if len(preferred) == 1 else indexes
    if len(indexes) > 1:
        raise FormatError(f"{path}: {len(indexes)} index files; give one file, or a folder with one")
    if not indexes:
        return None, {}
    listed = read_index(indexes[0])
    others = any(file.suffix == ".safetensors" for file in top)
    if others and not any(file.exists() or file.suffix == ".safetensors" for file in listed):
        return None, {}
    return indexes[0], listed


def loose(top: Iterable[Path]) -> list[Path]:
    """The weights of a folder without an index."""
    top = list(top)
    for kind in FILES:
        if found := [file for file in top if file.match(kind) and not BESIDE.match(file.name)]:
            return found
    return []


def refused(name: str, file: Path, folder: Path, inner: set[str]) -> str | None:
    """Why a file does not go along with the weights; "" if it is of another kind. None if it does."""
    last = name.rpartition("/")[2]
    textual = last.endswith(TEXT) or LICENCE.match(last)
    if not textual or last.endswith(INDEX) or BESIDE.match(last):
        return ""
    if any(name.startswith(f"{other}/") for other in inner):
        return "of other weights"
    if file.is_symlink() and not stays(file, folder):
        return "a link out of the folder"
    try:
        attachment_name(name).encode()
        plain = all(map(plain_name, name.split("/")))
    except ValueError:  # UnicodeEncodeError is one
        plain = False
    if not plain:  # `unpack` would refuse it
        return "an unsafe name"
    nbytes = file.stat().st_size
    if nbytes > (LARGEST if TOKENIZER.match(last) else SMALL):
        return f"{nbytes:,} bytes"
    return None


def plain_name(name: str) -> bool:
    """Whether a file of this name can be made in a folder, on every system."""
    fine = re.search(r'[\x00-\x1f\x7f/\\:*?"<>|]', name) is None and RESERVED.match(name) is None
    return fine and 0 < len(name.encode()) <= 240 and name[0] != "." and name[-1] not in ". "


def renamed(name: str) -> str:
    """The name of a weights file or an index as .safetensors: pytorch_model.bin is model.safetensors."""
    if name.endswith(SUFFIX) or name.endswith(f"{SUFFIX}{INDEX}"):
        return name
    ending = INDEX if name.endswith(INDEX) else ""
    stem = re.sub(r"\.(bin|pt|pth)$", "", name.removesuffix(ending))
    return f"{re.sub('^pytorch_model', 'model', stem)}{SUFFIX}{ending}"


def folded(name: str) -> str:
    """Equal for names that are one file on some system: of Windows or macOS, where capitals do not count, or
    where a letter with an accent is the same as one or as two characters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def stays(link: Path, folder: Path) -> bool:
    """Whether a link leads to a file of the folder, or to the blobs beside it in Hugging Face's cache, where
    snapshots/REVISION holds only links. Any other may lead to a private file of this machine."""
    target, inside = link.resolve(), folder.resolve()
    blobs = inside.parent.parent / "blobs"
    cached = inside.parent.name == "snapshots" and target.parent == blobs
    return cached or target.is_relative_to(inside)


def read_index(path: Path) -> dict[Path, set[str]]:
    """Files of a sharded checkpoint -> names of their tensors."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from None
    index = parse(raw, f"{path}: it")
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise FormatError(f"{path}: an index must have a weight_map: tensor -> file")
    files: dict[Path, set[str]] = {}
    for name, file in weights.items():
        # A path with folders could reach any file of this machine.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise FormatError(
                f"{path}: {name[:100]} is in {str(file)[:100]!r}, which is not a file in the same folder"
            )
        files.setdefault(path.parent / file, set()).add(name)
    return files


def read_from(path: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the weights of a file or a folder, and the index."""
    path = Path(path)
    return scan(path).read if os.path.isdir(path) else [path]  # False, too, for an invalid path


def inputs_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files that must not be overwritten when a file or folder of weights is read: those that are read,
    and those of the kinds of weights beside them."""
    path = Path(path)
    if not os.path.isdir(path):
        return [path]
    found = scan(path)
    beside = [path / name for name in found.others if "/" not in name]
    return [*found.read, *found.along.values(), *filter(is_kind, beside)]


def is_kind(file: Path) -> bool:
    """Whether this may be a file of weights, from its name."""
    return any(file.match(kind) for kind in FILES)
