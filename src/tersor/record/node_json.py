"""Node JSON: trees of nodes as JSON and named arrays, and back. The journal and the file's reader use it.

{"form": "affine", "bits": 4, "codes": {...}, "scale": {...}}     the arrays: "SITE:codes", "SITE:scale"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from tersor.errors import FormatError
from tersor.forms.node import NUMBERS, Node, child_names

N = TypeVar("N", bound=Node)
DEPTH = 8  # levels of nested nodes that a reader accepts


def flatten(form: Node, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON tree, arrays by name). A name is `prefix`, or below the root `prefix`, a colon and the path."""
    arrays: dict[str, Tensor] = {}

    def node(form: Node, path: str) -> dict[str, Any]:
        for array in form.arrays().values():  # a leaf holds one array
            arrays[f"{prefix}:{path}" if path else prefix] = array
        tree = {"form": form.name, **form.settings()}
        for key, child in form.children().items():
            tree[key] = node(child, f"{path}.{key}" if path else key)
        return tree

    return node(form, ""), arrays


def unflatten(tree: Any, prefix: str, array: Callable[[str], Tensor], forms: Mapping[str, type[N]]) -> N:
    """The inverse of `flatten`, for the nodes in the table `forms`. `array` returns an array by name.
    FormatError for anything unknown or misplaced."""

    def node(tree: Any, path: str, depth: int) -> N:
        where = f"{prefix}:{path}" if path else prefix
        if depth > DEPTH:
            raise FormatError(f"{where}: forms nested deeper than {DEPTH}")
        if not isinstance(tree, dict) or not isinstance(tree.get("form"), str):
            raise FormatError(f"{where}: a form must be an object with its name, not {str(tree)[:40]!r}")
        kind = forms.get(tree["form"])
        if kind is None:
            raise FormatError(
                f"{where}: form {tree['form'][:40]!r} is not known; known are {', '.join(sorted(forms))}"
            )
        fields: dict[str, Any] = {}
        known, children = {field.name: field for field in dataclasses.fields(kind)}, child_names(kind)
        for key, value in tree.items():
            if key == "form":
                continue
            if key not in known:
                raise FormatError(f"{where}: {kind.name} has no field {key[:40]!r}")
            if key in children:
                fields[key] = node(value, f"{path}.{key}" if path else key, depth + 1)
            else:
                fields[key] = setting(value, str(known[key].type), f"{where}: {kind.name}.{key}")
        for key, field in known.items():
            if field.type == "Tensor":
                fields[key] = array(where)
            elif key not in fields and field.default is dataclasses.MISSING:
                raise FormatError(f"{where}: {kind.name} lacks {key!r}")
        return kind(**fields)

    return node(tree, "", 0)


def setting(value: Any, declared: str, where: str) -> Any:
    """A setting from JSON, checked against its declared type; lists become tuples."""
    if declared == "tuple[int, ...]":
        fits = (
            isinstance(value, list)
            and all(type(v) is int and 0 <= v < 2**48 for v in value)
            and len(value) <= NUMBERS
        )
        value = tuple(value) if fits else value
    else:
        fits = {
            "int": type(value) is int and 0 <= value < 2**31,
            "bool": type(value) is bool,
            "str": type(value) is str,
        }.get(declared, False)
    if not fits:
        raise FormatError(f"{where} must be {declared}, not {str(value)[:40]!r}")
    return value
