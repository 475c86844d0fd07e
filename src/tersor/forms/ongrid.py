"""OnGrid: base of forms with integer codes and tables (of scales), with an entry per tensor, row or group.

table[o, g]     g is the group of column i:   i // group     equal groups; the last one may be shorter
                                              from `runs`    adjacent groups of any length, after a cut
                                              member[i]      in any order, after a cut that permutes
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from tersor.dtypes import FLOATS
from tersor.forms import form
from tersor.forms.at import At
from tersor.forms.coded import Coded
from tersor.forms.dense import Dense
from tersor.forms.form import Facts, Form, Shape, demand, from_rows, to_rows
from tersor.forms.node import NUMBERS

RUN, NODE = 2, 32  # bytes that a run, and one more child, take in a file's text, about
MEMBER = (torch.uint8, torch.int16, torch.int32)


class OnGrid(Form):
    """A form whose only aligned child is its codes."""

    tables: ClassVar[tuple[str, ...]] = ("scale", "zero")  # children with one column per group
    axis: int  # the axis of rows
    group: int = 0  # columns per group; 0: the whole row
    runs: tuple[int, ...] = ()  # columns of each group, if not equal
    member: Form | None = None  # [I], the group of each column, if groups are not contiguous

    @property
    def shape(self) -> Shape:
        return self.children()[self.aligned[0]].shape

    @cached_property
    def grouping(self) -> int | Tensor:
        """Columns per group or, if groups are not equal, the group of each column [I], for maths/."""
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
        """Decodes blocks of rows if rows are contiguous and no leaf is coded, else the whole tensor."""
        rows, columns = rows_of(self.shape, self.axis)
        if self.axis or len(self.shape) < 2 or any(isinstance(node, Coded) for _, node in self.walk()):
            return super().slices()
        blocks = torch.arange(rows).split(max(1, form.SLICE // max(columns, 1)))
        return even_slices(self.take(0, block).decode().reshape(-1) for block in blocks)

    def take(self, axis: int, index: Tensor) -> Self:
        """Cuts codes along any axis, tables with rows along the axis of rows, and groups along the others."""
        children, shape, codes = self.children(), self.shape, self.aligned[0]
        axis %= len(shape)
        cut = self.replace(**{codes: children.pop(codes).take(axis, index)})
        if axis == self.axis and len(shape) > 1:
            tables = {k: c for k, c in children.items() if len(c.shape) == 2 and c.shape[0] == shape[axis]}
            return cut.replace(**{key: table.take(0, index) for key, table in tables.items()})
        if isinstance(self.grouping, int) and ("scale" not in children or children["scale"].shape[1] == 1):
            return cut
        one = tuple(1 if a == self.axis else n for a, n in enumerate(shape)) if len(shape) > 1 else shape
        groups = from_rows(self.groups()[None], one, self.axis).index_select(axis, index)
        return cut.regrouped(to_rows(groups, self.axis)[0])

    def regrouped(self, groups: Tensor) -> Self:
        """This form with its columns in these groups [I], by `group`, `runs` or `member`: fewest bytes."""
        own, lengths = groups.unique_consecutive(return_counts=True)
        sizes = lengths.tolist()
        if len(set(sizes[:-1])) <= 1 and sizes[-1:] <= sizes[:1]:
            runs, best = (), self._with(own, max([1, *sizes]))
        else:
            runs, best = tuple(sizes), self._with(own, runs=tuple(sizes))
        used, member = groups.unique(return_inverse=True)
        if runs or len(used) < len(own):
            wide = MEMBER[(len(used) > 256) + (len(used) > 1 << 15)]
            other = self._with(used, member=Dense(member.to(wide)))
            costs = best.nbytes + RUN * len(runs), other.nbytes + NODE
            return best if costs[0] <= costs[1] and len(runs) <= NUMBERS else other
        return best

    def even(self) -> Self:
        """This form with equal groups, as large as its boundaries allow, for code that knows no others."""
        if not self.runs and self.member is None:
            return self
        groups = self.groups()
        edges = groups.unique_consecutive(return_counts=True)[1].cumsum(0)[:-1].tolist()
        size = math.gcd(*edges) or max(1, len(groups))
        return self._with(groups[::size], size)

    def _with(
        self, columns: Tensor, group: int = 0, runs: tuple[int, ...] = (), member: Dense | None = None
    ) -> Self:
        """This form with these columns of its tables and this grouping; a single column is for all groups."""
        found = {key: child for key, child in self.children().items() if key in self.tables}
        wide = found["scale"].shape[1]
        columns = columns if wide != 1 else columns.new_zeros(1)
        if not torch.equal(columns, torch.arange(wide)):
            found = {key: child.take(1, columns) for key, child in found.items()}
        if len(columns) == 1:
            group, runs, member = 0, (), None
        return self.replace(group=group, runs=runs, member=member, **found)

    def work(self, facts: Facts) -> int:
        return sum(self.runs)  # the group of each column, also if there are no rows

    def bounds(self) -> dict[str, tuple[int, int, str]]:
        return {} if self.member is None else {"member": (0, self.children()["scale"].shape[1] - 1, "groups")}

    def fact_of_rows(self, facts: Facts, *dtypes: torch.dtype) -> tuple[int, int]:
        """(O, I). FormatError unless the codes have one of these dtypes and groups and scale fit them."""
        codes, scale, member = facts[self.aligned[0]], facts.get("scale"), facts.get("member")
        demand(codes.dtype in dtypes, f"{self.aligned[0]} of {codes.dtype}")
        demand(0 <= self.axis < max(len(codes.shape), 1), f"axis {self.axis} of {list(codes.shape)}")
        rows, columns = rows_of(codes.shape, self.axis)
        given = bool(self.group) + bool(self.runs) + (member is not None)
        demand(given <= 1, "groups are given in two ways: set one of group, runs, member")
        fine = not self.runs or (min(self.runs) > 0 and sum(self.runs) == columns)
        demand(fine, f"runs {str(list(self.runs))[:40]} for rows of {columns}")
        groups = len(self.runs) or (-(-columns // self.group) if self.group else 1)
        if member is not None:
            fine = member.shape == (columns,) and member.dtype in MEMBER
            demand(fine, f"member of {member.dtype} {list(member.shape)} for rows of {columns}")
        if scale is not None:
            demand(scale.dtype in FLOATS, f"scale of {scale.dtype}")
            groups = scale.shape[-1] if member is not None and scale.shape else groups
            fine = scale.shape in ((1, 1), (rows, 1), (rows, groups))
            demand(fine, f"a table of {list(scale.shape)} for {rows} rows of {columns}")
        return rows, columns


def even(form: Form) -> Form:
    """The form with equal groups in all its grids; it decodes to the same bits."""
    return At(form).rebuilt(lambda at: at.node.even() if isinstance(at.node, OnGrid) else None)


def even_slices(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same elements, SLICE at a time; one empty slice if there are none."""
    held = torch.empty(0)
    for part in parts:
        held = torch.cat([held.to(part.dtype), part])
        *full, held = held.split(form.SLICE) if len(held) > form.SLICE else (held,)
        yield from full
    yield held


def rows_of(shape: Shape, axis: int) -> tuple[int, int]:
    """(O, I) of a tensor viewed as a matrix."""
    if len(shape) <= 1:
        return 1, math.prod(shape)
    return shape[axis], math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])
