"""Refit kept: after pruning, the weights that are kept take over what the others did, layer by layer.

q     min (q - w') H (q - w')^T, 0 outside of the mask; w' the floats that fit best     maths/kept_weights.py
walk  each layer is fitted to its outputs in the given model, from what it reads in the pruned one, without
      labels: layerwise.py. Of a layer whose inputs cannot be observed the kept weights stay as they are
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.encode import refine
from tersor.errors import few
from tersor.forms import At, Dense, Form, uncoded
from tersor.forms.form import from_rows, to_rows
from tersor.maths.damping import damping
from tersor.maths.kept_weights import cost, kept_weights
from tersor.model.sites import Site
from tersor.record.events import Note
from tersor.steps.layerwise import Layerwise, grouped, leaf_of

SAME = 1e-12  # of the outputs' energy: a smaller error is that of rounding


@dataclass(kw_only=True)
class RefitKept(Layerwise):
    """Pruned weights. `plain` sets the mask and changes nothing else."""

    masked: dict[str, Form] = field(default_factory=dict)  # each weight with its new mask

    def why_not(self, site: Site) -> str:
        form = self.masked[site.name]
        if leaf_of(form, site) is None:
            return "it is stored as a product or a sum"
        plain = all(isinstance(at.node, Dense) for at in At(uncoded(form)).down() if at.body)
        return "" if plain else "its weights are on a grid"

    def pull(self, h: Tensor, count: int) -> Tensor:
        """More of it where samples are few: else the kept weights fit these alone."""
        return torch.maximum(super().pull(h, count), h.new_tensor([damping(each, count) for each in h]))

    def fitted(self, site: Site, w: Tensor, h: Tensor, pull: Tensor) -> None:
        groups = len(w)

        def store(old: Tensor, keep: Tensor | None, axis: int) -> Form:
            keep = torch.ones_like(old, dtype=torch.bool) if keep is None else keep
            mask = grouped(to_rows(keep, axis), groups)
            given = torch.where(mask, grouped(to_rows(old, axis), groups).double(), 0.0)
            q = kept_weights(w, h, pull, mask)
            # Rows that already fit stay bit for bit: where nothing was pruned, here and before this layer.
            q = torch.where(cost(given, w, h) <= SAME * cost(torch.zeros_like(w), w, h), given, q)
            return Dense(from_rows(q.flatten(0, 1).to(old.dtype), tuple(old.shape), axis).contiguous())

        self.forms[site.name], self.hows[site.name] = refine(self.masked[site.name], store, site.axis)

    def notes(self) -> Iterator[Note]:
        count = len(self.done)
        text = (
            f"the kept weights of {count} layer{'s' * (count != 1)} refitted to what the layers gave before"
        )
        if self.left:
            text += "; as they were: " + few(f"{name} ({why})" for name, why in self.left.items())
        if self.thin:
            text += "; few samples, so that they may fit them alone; give more calibration batches: "
            text += few(f"{name} ({many})" for name, many in self.thin.items())
        yield Note("", "corrected", text, {"layers": count, "left": self.left, "few": self.thin})
