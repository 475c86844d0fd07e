"""Integers: which integers of the model's own code follow its widths, and their values after a cut.

self.heads -> Traced(12): an int that remembers `heads` through + - * // %      one run in eager mode shows
x.view(B, N, self.heads, self.width // self.heads)      which literals of which operators come from it
The graph says what each literal must become (run_graph.py); the attributes are solved for, one at a time.
Stock layers have a table of their own (model/sizes.py); only their numbers of groups are set here.
Cost: one forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from tersor.model.changes import Set
from tersor.model.channels.run_graph import GraphRun
from tersor.model.graph import arguments, first, op_name, value
from tersor.model.ops import name_of
from tersor.model.sizes import TABLE

Name = tuple[str, str]  # module, attribute
Formula = Name | int | tuple[str, Any, Any]  # an attribute, a number, an operation
STOCK = tuple(kind for kinds, _ in TABLE for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod,
}  # fmt: skip


class Traced(int):
    """An integer that remembers how it was computed from attributes."""

    formula: Formula

    def __new__(cls, number: int, formula: Formula) -> Self:
        new = int.__new__(cls, number)
        new.formula = formula
        return new

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def _operation(name: str, swapped: bool) -> Callable[[Traced, Any], Any]:
    def run(a: Traced, b: Any) -> Any:
        if type(b) not in (int, Traced):
            return NotImplemented
        left, right = (b, a) if swapped else (a, b)
        return Traced(OPERATIONS[name](int(left), int(right)), (name, formula_of(left), formula_of(right)))

    return run


for _name in OPERATIONS:
    setattr(Traced, f"__{_name}__", _operation(_name, swapped=False))
    setattr(Traced, f"__r{_name}__", _operation(_name, swapped=True))


def formula_of(number: int) -> Formula:
    return number.formula if isinstance(number, Traced) else int(number)


def names_in(formula: Formula) -> Iterator[Name]:
    if isinstance(formula, tuple) and len(formula) == 3:
        yield from names_in(formula[1])
        yield from names_in(formula[2])
    elif isinstance(formula, tuple):
        yield formula


def evaluated(formula: Formula, values: Mapping[Name, int]) -> int:
    if isinstance(formula, tuple) and len(formula) == 3:
        return int(OPERATIONS[formula[0]](*(evaluated(part, values) for part in formula[1:])))
    return values[formula] if isinstance(formula, tuple) else formula


@dataclass(frozen=True)
class Use:
    """A literal that comes from attributes: the k-th call of an operator by the code of one module."""

    path: str
    op: str
    call: int
    place: int  # among the integers of the call
    formula: Formula
    was: int


class Uses(NamedTuple):
    """The uses of attributes in one forward, and the values of all attributes."""

    found: list[Use]
    values: dict[Name, int]


class Recorder(TorchFunctionMode):
    """Records the uses of traced integers in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[str] = []
        self.counts: dict[tuple[str, str], int] = {}
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, path = name_of(func), self.frames[-1] if self.frames else ""
        name = name if name.endswith("__") else named(name)
        call = self.counts[path, name] = self.counts.get((path, name), -1) + 1
        bounds = args[2:4] if name == "slice" else args  # the operator's; literals() shows no axis of it
        numbers = list(integers((bounds, kwargs or {})))
        found = [(k, n) for k, n in enumerate(numbers) if isinstance(n, Traced)]
        self.uses += [Use(path, name, call, k, n.formula, int(n)) for k, n in found]
        plain = (plainly(args), plainly(kwargs or {})) if found else (args, kwargs or {})
        return func(*plain[0], **plain[1])


def named(operator: str) -> str:
    """One name for the operators of one function of the code."""
    name = operator.removesuffix("_")
    return "split" if name == "split_with_sizes" else name


def integers(item: Any) -> Iterator[int]:
    if isinstance(item, int) and not isinstance(item, bool):
        yield item
    elif isinstance(item, slice):
        for part in (item.start, item.stop):
            yield from integers(part)
    elif isinstance(item, dict):
        for part in item.values():
            yield from integers(part)
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from integers(part)


def plainly(item: Any) -> Any:
    """The same with ordinary integers."""
    if isinstance(item, Traced):
        return int(item)
    if isinstance(item, slice):
        return slice(*(plainly(part) for part in (item.start, item.stop, item.step)))
    if isinstance(item, dict):
        return {key: plainly(part) for key, part in item.items()}
    return type(item)(map(plainly, item)) if type(item) in (tuple, list) else item


def uses_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> Uses:
    """The uses of attributes in one forward of a private copy, which is changed. `run` calls it."""
    recorder = Recorder()
    values: dict[Name, int] = {}

    def enter(path: str) -> Callable[[Any, Any], None]:
        return lambda module, args: recorder.frames.append(path)

    def leave(module: Any, args: Any, out: Any) -> None:
        recorder.frames.pop()

    for path, module in model.named_modules():
        module.register_forward_pre_hook(enter(path))
        module.register_forward_hook(leave)
        if isinstance(module, STOCK):
            continue
        for key, item in list(vars(module).items()):
            if not key.startswith("_") and key != "training":
                vars(module)[key] = traced(path, key, item, values)
    with torch.no_grad(), recorder:
        run(model)
    return Uses(recorder.uses, values)


def traced(path: str, key: str, item: Any, values: dict[Name, int]) -> Any:
    """An attribute with traced integers, also inside a tuple or a list; `values` gets what they were."""
    if type(item) is int:
        values[path, key] = item
        return Traced(item, (path, key))
    if type(item) in (tuple, list) and item and all(type(part) is int for part in item):
        return type(item)(traced(path, f"{key}.{at}", part, values) for at, part in enumerate(item))
    return item


SHAPING = ("view", "reshape", "expand", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_full",
           "broadcast_to", "new_empty", "unflatten")  # fmt: skip
WIDTHS = ("repeat_interleave", "repeat", "layer_norm", "rms_norm", "group_norm", "conv2d", "conv1d",
          "channel_shuffle")  # fmt: skip


def literals(run: GraphRun, node: fx.Node) -> list[tuple[int, int]]:
    """(before, after) for the integers in a call of this operator, in the order of its arguments."""
    name, given, mine = op_name(node).removesuffix("_"), arguments(node), run.label(node)
    if name in SHAPING:
        sizes = list(zip(value(node).shape, run.sizes(mine), strict=True))
        if name == "unflatten":
            at = int(given["dim"]) % len(value(first(node)).shape)
            return [(int(given["dim"]), int(given["dim"])), *sizes[at : at + len(given["sizes"])]]
        return sizes
    if name in ("split", "split_with_sizes", "chunk"):
        at = int(given.get("dim") or 0) % len(run.label(first(node)))
        parts = [(len(label[at]), run.count(label[at])) for label in mine]
        one = isinstance(given.get("split_size"), int)
        return parts[:1] if one else [] if name == "chunk" else parts
    if name in ("slice", "narrow"):
        after = dict(given)
        run.bounded(name, after, run.label(node.args[0]))
        keys = ("start", "end") if name == "slice" else ("dim", "start", "length")
        return [(int(given[k]), int(after[k])) for k in keys if isinstance(given.get(k), int)]
    if name in WIDTHS:
        holder: dict[str, Any] = dict(given)
        holder["self"] = torch.empty(run.sizes(run.label(node.args[0])), device="meta")
        after = run.narrowed(node, name, holder)
        both = ({k: v for k, v in each.items() if not isinstance(v, Tensor)} for each in (given, after))
        return list(zip(*map(integers, both), strict=False))
    return []


def settings_of(run: GraphRun, uses: Uses) -> list[Set]:
    """The integers to set so that the code's literals are those of the cut graph. Where an attribute's uses
    disagree none is set; the comparison with the graph then fails."""
    calls: dict[tuple[str, str], list[fx.Node]] = {}
    for node in run.groups.nodes():
        calls.setdefault((run.groups.graph.path(node), named(op_name(node))), []).append(node)
    wanted = list(dict.fromkeys(pair for use in uses.found for pair in demands(run, use, calls)))
    after = solved(wanted, uses.values)
    return [
        Set(path, key, after[path, key]) for path, key in after if after[path, key] != uses.values[path, key]
    ]


def demands(
    run: GraphRun, use: Use, calls: Mapping[tuple[str, str], list[fx.Node]]
) -> Iterator[tuple[Formula, int]]:
    """(formula, its value after the cut) by one use."""
    same = calls.get((use.path, use.op), [])
    if use.call < len(same):
        pairs = literals(run, same[use.call])
        if use.place < len(pairs) and pairs[use.place][0] == use.was:
            yield use.formula, pairs[use.place][1]
            return
    kinds = ("slice", "narrow") if use.op == "__getitem__" else (use.op,)
    nodes = (node for kind in kinds for node in calls.get((use.path, kind), []))
    found = {after for node in nodes for before, after in literals(run, node) if before == use.was}
    if len(found) == 1:
        yield use.formula, found.pop()


def solved(wanted: list[tuple[Formula, int]], before: Mapping[Name, int]) -> dict[Name, int]:
    """Values of the attributes for which the formulas have the wanted values, as far as there are any. First
    attributes that are a literal themselves, then formulas with one unknown."""
    found: dict[Name, int] = {}
    clash: set[Name] = set()
    for formula, after in wanted:
        for name in names_in(formula) if formula in before else ():
            if found.setdefault(name, after) != after:
                clash.add(name)
    found = {name: value for name, value in found.items() if name not in clash}
    for spare in (1, 2):  # formulas with one unknown before those with two
        for formula, after in wanted:
            unknown = [name for name in dict.fromkeys(names_in(formula)) if name not in found]
            if not 0 < len(unknown) <= spare or any(name in clash for name in unknown):
                continue
            values = {**before, **found}
            for name in unknown:
                tried = (n for n in range(before[name], 0, -1) if fits(formula, {**values, name: n}, after))
                if (number := next(tried, None)) is not None:
                    found[name] = number
                    break
    return found


def fits(formula: Formula, values: Mapping[Name, int], wanted: int) -> bool:
    try:
        return evaluated(formula, values) == wanted
    except ZeroDivisionError:
        return False
