"""At: a node in its place: the one way through a tree of forms, with what is handed down to each node.

keep    the mask above: only along aligned children, narrowed by each mask on the way
axis    of its rows; a product's factors have rows of their own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from tersor.forms.form import Form


@dataclass(eq=False)
class At:
    """A node of a tree of forms, and what lies above it. At(form) is the root of a tree."""

    node: Form
    axis: int = 0
    given: Tensor | None = None  # a mask above the root
    path: str = ""  # "" for the root, a child's "codes" or "body.codes"
    weights: bool = True  # the root, and what structures hand on: no mask, no table, no codes
    above: At | None = None  # the parent, if this node is aligned with it

    @cached_property
    def keep(self) -> Tensor | None:
        """The mask above, bool of the node's shape; what it hides need not be stored. Decoded when asked."""
        return self.given if self.above is None else self.above._within

    @cached_property
    def _within(self) -> Tensor | None:
        return self.node.within(self.keep)

    @property
    def body(self) -> bool:
        """Whether it is weights and holds the numbers."""
        return self.weights and not self.node.inner

    @property
    def masks(self) -> tuple[str, ...]:
        """The paths of the masks that make `keep`, from the root down."""
        up = self.above
        if up is None:
            return ()
        return up.masks + ((f"{up.path}.{up.node.mask}".lstrip("."),) if up.node.mask else ())

    def below(self) -> Iterator[tuple[str, At]]:
        """The children, by name."""
        for key, child in self.node.children().items():
            inner = key in self.node.inner
            axis = self.axis if self.node.rows is None or not inner else self.node.rows
            above = self if key in self.node.aligned else None
            path = f"{self.path}.{key}".lstrip(".")
            yield key, At(child, axis, None, path, self.weights and inner, above)

    def down(self) -> Iterator[At]:
        """This node and all below it, in the order of the tree."""
        yield self
        for _, at in self.below():
            yield from at.down()

    def rebuilt(self, change: Callable[[At], Form | None]) -> Form:
        """The tree with each node that `change` makes another one; where it says None its children are asked.
        What stays as it is is the same object."""
        new = change(self)
        if new is not None:
            return new
        old = self.node.children()
        fields = {key: at.rebuilt(change) for key, at in self.below()}
        return self.node if all(fields[key] is old[key] for key in old) else self.node.replace(**fields)
