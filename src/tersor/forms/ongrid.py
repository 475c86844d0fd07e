"""OnGrid: what grids share: codes seen as rows; tables with an entry for all, a row or a group of columns.

table[o, g]     g the group of column i:   i // group     even groups; the last one may be shorter
                                           as runs say    side by side, of any length: a cut leaves such
                                           member[i]      in any order: a cut may also permute
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from tersor.forms.at import At
from tersor.forms.coded import Coded
from tersor.forms.dense import Dense
from tersor.forms.form import FLOATS, SLICE, Fact, Form, Shape, demand

RUN, NODE = 2, 32  # bytes about that a run, and one child more, take in a file's text
MEMBER = (torch.uint8, torch.int16, torch.int32)


class OnGrid(Form):
    """A form whose one aligned child is its codes."""

    tables: ClassVar[tuple[str, ...]] = ("scale", "zero")  # children with a column for each group
    axis: int  # of rows
    group: int = 0  # columns a group; 0: the whole row
    runs: tuple[int, ...] = ()  # columns of each group, where they are not even
    member: Form | None = None  # [I], the group of each column, where those of a group are not side by side

    @property
    def shape(self) -> Shape:
        return self.children()[self.aligned[0]].shape

    @cached_property
    def grouping(self) -> int | Tensor:
        """Columns a group or, where they are not even, the group of each column [I]: as maths/ takes it."""
        if self.member is not None:
            return self.member.decode().long()
        if self.runs:
            return torch.arange(len(self.runs)).repeat_interleave(torch.tensor(self.runs))
        return self.group

    def groups(self) -> Tensor:
        """The group of each column, int64 [I]."""
        even = self.grouping
        columns = rows_of(self.shape, self.axis)[1]
        return even if isinstance(even, Tensor) else torch.arange(columns) // (even or max(columns, 1))

    def slices(self) -> Iterator[Tensor]:
        """Rows are decoded some at a time where they lie one behind the other and no stream stands before
        them."""
        rows, columns = rows_of(self.shape, self.axis)
        if self.axis or len(self.shape) < 2 or any(isinstance(node, Coded) for _, node in self.walk()):
            return super().slices()
        blocks = torch.arange(rows).split(max(1, SLICE // max(columns, 1)))
        return even_slices(self.take(0, block).decode().reshape(-1) for block in blocks)

    def take(self, axis: int, index: Tensor) -> Self:
        """Codes follow any axis; a table that has rows follows the axis of rows, and groups the columns."""
        children, shape, codes = self.children(), self.shape, self.aligned[0]
        axis %= len(shape)
        fields = {codes: children[codes].take(axis, index)}
        if axis == self.axis and len(shape) > 1:
            kept = {key: child for key, child in children.items() if key != codes and len(child.shape) == 2}
            fields |= {k: child.take(0, index) for k, child in kept.items() if child.shape[0] == shape[axis]}
            return self.replace(**fields)
        cut = self.replace(**fields)
        if "scale" not in children or children["scale"].shape[1] == 1:
            return cut
        others = [n for a, n in enumerate(shape) if a != self.axis] if len(shape) > 1 else list(shape)
        columns = torch.arange(math.prod(others)).reshape(others)
        at = axis - (axis > self.axis) if len(shape) > 1 else 0
        return cut.regrouped(self.groups()[columns.index_select(at, index).flatten()])

    def regrouped(self, groups: Tensor) -> Self:
        """This form with its columns in these groups of its tables [I], in about the fewest bytes."""
        own, lengths = groups.unique_consecutive(return_counts=True)
        sizes = lengths.tolist()
        if len(set(sizes[:-1])) <= 1 and sizes[-1:] <= sizes[:1]:
            runs, best = (), self._with(own, max([1, *sizes[:1]]))
        else:
            runs = tuple(sizes)
            best = self._with(own, runs=runs)
        used, member = groups.unique(return_inverse=True)
        if runs or len(used) < len(own):
            wide = MEMBER[(len(used) > 256) + (len(used) > 1 << 15)]
            other = self._with(used, member=Dense(member.to(wide)))
            best = min(
                best, other, key=lambda made: made.nbytes + RUN * len(made.runs) + NODE * (made is other)
            )
        return best

    def even(self) -> Self:
        """This form with even groups, for whoever knows no others: as large as the edges of its own allow."""
        if not self.runs and self.member is None:
            return self
        groups = self.groups()
        edges = groups.unique_consecutive(return_counts=True)[1].cumsum(0)[:-1].tolist()
        size = math.gcd(*edges) or max(1, len(groups))
        return self._with(groups[::size], size)

    def _with(
        self, columns: Tensor, group: int = 0, runs: tuple[int, ...] = (), member: Dense | None = None
    ) -> Self:
        """These columns of the tables, and what says whose they are: one column alone is everyone's."""
        found = {key: child for key, child in self.children().items() if key in self.tables}
        if not torch.equal(columns, torch.arange(found["scale"].shape[1])):
            found = {key: child.take(1, columns) for key, child in found.items()}
        if len(columns) == 1:
            group, runs, member = 0, (), None
        return self.replace(group=group, runs=runs, member=member, **found)

    def bounds(self) -> dict[str, tuple[int, int, str]]:
        return {} if self.member is None else {"member": (0, self.children()["scale"].shape[1] - 1, "groups")}

    def fact_of_rows(self, facts: Mapping[str, Fact], *dtypes: torch.dtype) -> tuple[int, int]:
        """(O, I), where codes of these dtypes and a scale fit each other."""
        codes = facts[self.aligned[0]]
        demand(codes.dtype in dtypes, f"{self.aligned[0]} of {codes.dtype}")
        demand(0 <= self.axis < max(len(codes.shape), 1), f"axis {self.axis} of {list(codes.shape)}")
        rows, columns = rows_of(codes.shape, self.axis)
        demand(bool(self.group) + bool(self.runs) + ("member" in facts) <= 1, "groups are told in two ways")
        demand(not self.runs or min(self.runs) > 0, "a run of no columns")
        runs = sum(self.runs) if self.runs else columns
        demand(runs == columns, f"runs of {runs} columns for rows of {columns}")
        if "scale" not in facts:
            return rows, columns
        shape, dtype = facts["scale"]
        demand(dtype in FLOATS, f"scale of {dtype}")
        allowed = {(1, 1), (rows, 1)}
        if self.group:
            allowed.add((rows, -(-columns // self.group)))
        if self.runs:
            allowed = {(rows, len(self.runs))}
        if "member" in facts:
            member = facts["member"]
            fine = member.shape == (columns,) and member.dtype in MEMBER
            demand(fine, f"member of {member.dtype} {list(member.shape)} for rows of {columns}")
            allowed = {(rows, *shape[1:])} if len(shape) == 2 else set()
        demand(shape in allowed, f"a table of {list(shape)} for {rows} rows of {columns}")
        return rows, columns


def even(form: Form) -> Form:
    """The form with even groups in all its grids; it decodes to the same bits."""
    return At(form).rebuilt(lambda at: at.node.even() if isinstance(at.node, OnGrid) else None)


def even_slices(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same elements, SLICE at a time; of none one slice."""
    held = torch.empty(0)
    for part in parts:
        held = torch.cat([held.to(part.dtype), part])
        *full, held = held.split(SLICE) if len(held) > SLICE else (held,)
        yield from full
    yield held


def rows_of(shape: Shape, axis: int) -> tuple[int, int]:
    """(O, I) of a tensor seen as a matrix."""
    if len(shape) <= 1:
        return 1, math.prod(shape)
    return shape[axis], math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])
