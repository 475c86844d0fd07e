"""Program guards: for which arguments torch.export followed the code, besides their fixed sizes.

if x.shape[0] > 4: ...      traced with 8 samples  ->  "x.size()[0] >= 5"
module() of an ExportedProgram checks them in a function of its own, each with its text in the message. The
texts name the arguments as the signature does, so they are kept and checked by the program (program.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_unflatten

from tersor.errors import RefusedError
from tersor.model.graph import placeholders

FAILED = "Guard failed: "
UNBOUNDED = 2**62  # an upper limit from here on is none
CHECKS = "_guards_fn"  # the part of the module that checks them


def guards_of(source: ExportedProgram | fx.GraphModule, graph: Any) -> tuple[str, ...]:
    """The guards of a program, or of `graph`, its module. RefusedError if a program has some that its module
    does not check."""
    if (function := getattr(graph, CHECKS, None)) is not None:
        found = [text for text in texts(function.forward) if text.startswith(FAILED)]
        if not found:  # it is only made if there is something to check
            raise RefusedError(
                f"the program's checks are not worded as known: PyTorch {torch.__version__}. They would not "
                "be made, and other arguments may run another way through the code"
            )
        return tuple(dict.fromkeys(text.removeprefix(FAILED) for text in found))
    if getattr(source, "_guards_code", None):
        raise RefusedError(
            "the program's code depends on sizes that may vary, and it has no example inputs, so they "
            "are not checked. Export the model again, or give program.module() to do without the checks"
        )
    return tuple(ranges(graph))


def texts(function: Any) -> Iterator[str]:
    """The strings in a function's code, and in that of the functions it wraps."""
    if isinstance(function, FunctionType):
        yield from (item for item in function.__code__.co_consts if isinstance(item, str))
        for cell in function.__closure__ or ():
            yield from texts(cell.cell_contents)


def ranges(graph: Any) -> Iterable[str]:
    """Of a module without such a function: the range of each size that may vary, and which are equal. Sizes
    that are sums or products of others are left to the operators."""
    first: dict[Any, str] = {}
    nodes = placeholders(graph.graph)
    args, kwargs = tree_unflatten(nodes, graph._in_spec)
    given = inspect.signature(graph.forward).bind(*args, **kwargs).arguments
    for path, node in tree_leaves_with_path(given):
        name = path[0].key + keystr(path[1:])  # type: ignore[attr-defined]
        value = node.meta.get("val")
        for at, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            limits = graph.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if limits is None:
                continue
            text = f"{name}.size()[{at}]"
            if (same := first.setdefault(size.node.expr, text)) != text:
                yield f"{text} == {same}"
            low, high = float(limits.lower), float(limits.upper)
            if low > 2:  # a range from 2 on says that 1 may be broadcast; programs take 1 too
                yield f"{text} >= {int(low)}"
            if high < UNBOUNDED:
                yield f"{text} <= {int(high)}"
