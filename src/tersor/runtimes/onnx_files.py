"""ONNX files: the files that an ONNX model consists of. Weights above 2 GB are in files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.errors import FormatError, StorageError, first_line, need


def files_of(path: Path) -> list[Path]:
    """The file itself, and those that hold its tensors. FormatError if it is not an ONNX file, StorageError
    if one of them is missing. Cost: one read of the file, without the others."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise need("onnx", "onnxruntime", f"{path}: finding its files") from None

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise FormatError(f"{path}: it is not an ONNX file: {first_line(error)}") from error
    found = [path, *(path.parent / name for name in dict.fromkeys(places(graph)))]
    if lacking := [str(file) for file in found if not file.is_file()]:
        raise StorageError(f"{path}: its weights are in {lacking[0]}, which does not exist")
    return found


def places(graph: Any) -> Iterator[str]:
    """The names of the files with tensors of a graph, those of its branches and loops too."""
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                yield from places(inner)
    for tensor in tensors:
        if tensor.data_location == tensor.EXTERNAL:
            yield from (item.value for item in tensor.external_data if item.key == "location")
