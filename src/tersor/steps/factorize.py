"""Factorize: store a weight as the product of two thin factors.

w [O, I] ~ left [O, R] right [R, I]      truncated SVD (Denton 2014)
whitened  least error on the layer's own inputs, E|(w - left right) x|^2, from the second moment of x on
          calibration batches (SVD-LLM 2024)
stored    R * (O + I) numbers instead of O * I. If that is not fewer, the layer is left alone, with a note.
          A lost mask is noted too
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.core.view import View
from tersor.errors import RefusedError, SettingError
from tersor.forms import Dense, LowRank, uncoded
from tersor.maths.ranks import rank_for_energy, rank_for_keep, svd_factors, whitened_factors
from tersor.model.sites import Site
from tersor.record.events import Edit, Group, Note, site_group
from tersor.setting_effects import check_effect
from tersor.settings import check
from tersor.steps.retrain import Retrain


@dataclass(frozen=True, kw_only=True)
class Factorize(Retrain):
    """Store weights as low-rank products, by SVD."""

    name: ClassVar[str] = "factorize"
    keep: float | None = None  # share of the parameters kept; 0.5 if neither rank nor energy is given
    rank: int | None = None  # or the rank itself
    energy: float | None = None  # or the share of squared singular values kept
    whiten: bool = True  # weigh errors by the layer's inputs, if the task has calibration batches

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [key for key in ("keep", "rank", "energy") if getattr(self, key) is not None]
        if len(given) > 1:
            raise SettingError(
                f"factorize: {' and '.join(given)} given, but only one of keep, rank, energy can set the rank"
            )
        check(
            self.keep is None or 0 < self.keep < 1,
            self,
            "keep",
            "it is the share of parameters kept: 0 < keep < 1",
        )
        check(self.rank is None or self.rank >= 1, self, "rank", "it is a count: 1 or more")
        check(self.energy is None or 0 < self.energy <= 1, self, "energy", "it is a share: 0 < energy <= 1")
        check_effect(self)

    def run(self, view: View) -> Iterator[Group]:
        if self.epochs == 0:
            for site in view.each(self.where):
                yield site_group(site.name, *self.factored(view, site))
            return
        made = [event for site in view.weights(self.where) for event in self.factored(view, site)]
        _, events = self.retrained(view, {event.site: event for event in made if isinstance(event, Edit)})
        yield Group("all", (*events, *(event for event in made if isinstance(event, Note))))

    def factored(self, view: View, site: Site) -> tuple[Edit | Note, ...]:
        """One site's events: an edit with a note, or a note with the reason for leaving it alone."""
        form = view.form(site)
        w = form.decode().float()
        if w.ndim < 2 or w.numel() == 0:
            return (Note(site.name, "skipped", f"shape {list(w.shape)} cannot be factorized as a matrix"),)
        rows = w.flatten(1)  # [O, I]; in a transposed convolution the rows are inputs, which works as well
        rank = self.rank_for(rows)
        outs, ins = rows.shape
        if rank * (outs + ins) >= outs * ins:
            why = f"rank {rank} stores {rank * (outs + ins)} numbers, the weight {outs * ins}"
            return (Note(site.name, "skipped", why),)
        gram = None
        if self.whiten and view.maybe_task is not None and view.maybe_task.calibrate is not None:
            gram = view.gram(site)
        if gram is not None and not gram.isfinite().all():
            raise RefusedError(
                f"factorize: {site.name} reads NaN or infinity on the calibration batches, or numbers whose "
                f"squares are. Use whiten=false, or exclude the weight with where='!{site.name}'"
            )
        if gram is not None and site.axis:  # [I, O]: the inputs are the rows here
            right, left = (factor.T for factor in whitened_factors(rows.T, gram, rank))
        else:
            left, right = svd_factors(rows, rank) if gram is None else whitened_factors(rows, gram, rank)
        after = LowRank(Dense(left.contiguous()), Dense(right.reshape(rank, *w.shape[1:]).contiguous()))
        how = "refine" if isinstance(uncoded(form), Dense) else "absorb"
        text = f"rank {rank} of {min(outs, ins)}, {'plain' if gram is None else 'whitened'} SVD"
        lost = int((w == 0).sum()) if any(node.mask for _, node in form.walk()) else 0
        text += f"; {lost} zeros of its mask are lost, since a product keeps none" if lost else ""
        data = {"rank": rank, "whitened": gram is not None} | ({"lost": lost} if lost else {})
        note = Note(site.name, "done", text, data)
        return (Edit(site.name, form, after, how), note)

    def rank_for(self, rows: Tensor) -> int:
        if self.rank is not None:
            return self.rank
        if self.energy is not None:
            return rank_for_energy(rows, self.energy)
        return rank_for_keep(rows.shape[0], rows.shape[1], 0.5 if self.keep is None else self.keep)
