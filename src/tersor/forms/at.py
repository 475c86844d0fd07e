"""At: a place in a tree of forms, with its context. All code that traverses such a tree does it here.

keep    the mask above, passed down to children of the same shape, and narrowed by each mask on the path
axis    the axis of the node's rows; the factors of a product have their own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from tersor.forms.form import Form


@dataclass(eq=False)
class At:
    """A node of a tree of forms, with its path, mask and parent. At(form) is the root of a tree."""

    node: Form
    axis: int = 0
    given: Tensor | None = None  # a mask above the root
    path: str = ""  # "" for the root, a child's "codes" or "body.codes"
    weights: bool = True  # decodes to weights: the root and `inner` children, not masks, tables or codes
    above: At | None = None  # the parent, if this node is aligned with it

    @cached_property
    def keep(self) -> Tensor | None:
        """The mask above, bool of the node's shape. Hidden elements need not be stored. Decoded once."""
        return self.given if self.above is None else self.above._within

    @cached_property
    def _within(self) -> Tensor | None:
        return self.node.within(self.keep)

    @property
    def body(self) -> bool:
        """Whether the node decodes to weights and has no `inner` children."""
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
        """The tree with each node replaced by change(node). If that is None, the node's children are visited.
        Unchanged nodes are returned as the same objects."""
        new = change(self)
        if new is not None:
            return new
        old = self.node.children()
        fields = {key: at.rebuilt(change) for key, at in self.below()}
        return self.node if all(fields[key] is old[key] for key in old) else self.node.replace(**fields)
