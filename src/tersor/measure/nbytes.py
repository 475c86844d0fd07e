"""Nbytes: bytes of files on disk, and of a model as fp32.

fp32 = sum over distinct tensors of the state of N * 4, buffers included; integers at their own width
A tensor under two names counts once, since other formats also store it once.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from tersor.errors import StorageError


def file_nbytes(*paths: str | Path) -> int:
    """Bytes of files, and of all files in folders. A file that is named twice counts once.

    StorageError for a path that does not exist.
    """
    files: set[Path] = set()
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files.update(item.resolve() for item in path.rglob("*") if item.is_file())
        elif path.is_file():
            files.add(path.resolve())
        else:
            raise StorageError(f"{path}: no such file or folder")
    return sum(path.stat().st_size for path in files)


def fp32_nbytes(model: nn.Module) -> int:
    """Bytes of the model's state with floats of four bytes: a plain checkpoint's payload."""
    return sum(value.numel() * _width(value) for value in state_tensors(model))


def state_tensors(model: nn.Module) -> list[Tensor]:
    """The distinct tensors of the state: parameters and persistent buffers, tied ones once."""
    distinct: dict[object, Tensor] = {}
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, Tensor):  # a module's extra state may have any type
            # Tied weights are one object, or two views of one memory. A tensor without memory has no address.
            place = value.data_ptr() if value.device.type != "meta" and value.numel() else 0
            distinct.setdefault((place, value.numel()) if place else id(value), value)
    return list(distinct.values())


def _width(value: Tensor) -> int:
    """Bytes of an element; floats count as fp32."""
    if value.is_complex():
        return 8
    return 4 if value.is_floating_point() else value.element_size()
