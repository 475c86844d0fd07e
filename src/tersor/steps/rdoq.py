"""Rdoq: rate-distortion optimized quantization, for a size, an accuracy, or a price of a bit.

min E |dy|^2 + lam * bits      dy: change of the model's output; bits: under an adaptive model of neighbors,
                               as the entropy coder codes them; one lam for all layers spends each bit where
                               it helps most
weigh   output: curvature of the output (model/curvature.py); inputs: second moments of each layer's inputs,
        as in GPTQ and CERWU; none: each tensor's squared error over its sum of squares, without data
Nothing is trained. Cost: one pass forward and backward over the calibration batches, then a few seconds per
20 million weights for each lam that is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import RefusedError, SettingError
from tersor.forms import Form
from tersor.measure.accuracy import Drop
from tersor.model.sites import Site
from tersor.record.events import Edit, Group, Note, site_group
from tersor.setting_effects import Only, check_effect
from tersor.settings import check, check_settings, check_word
from tersor.steps.drop_search import Deciding, deciding
from tersor.steps.entropy import Entropy
from tersor.steps.price_search import largest, least
from tersor.steps.site_rounding import MORE, PER, SiteRounding, site_roundings

TARGETS = ("bits", "nbytes", "max_drop", "lam")
WEIGH = ("auto", "output", "inputs", "none")
BITS = 4.0  # a weight, if no target is given
BEGIN = 5.0  # bits a weight at which the search for an accuracy begins
NODE = 48  # approximate bytes of the file's header for one array of a form
LOWER = 0.84  # factor of a price whose codes lose more than the fit says
TRIES = 4  # times that a file's size is measured and corrected


@dataclass(frozen=True, kw_only=True)
class Rdoq:
    """Quantize for the fewest bits at a given size, accuracy or price of a bit; nothing is trained."""

    name: ClassVar[str] = "rdoq"
    only: ClassVar[Only] = {
        "damp": {"weigh": ("auto", "output", "inputs")},
        "passes": {"weigh": ("auto", "output")},
        "vectors": {"where": ("*",)},
    }
    bits: float | None = None  # a weight, on average, before the entropy step; 4 if no target is given
    nbytes: int | None = None  # of the whole model after the entropy step
    # Allowed loss of the task's metric, in points if a share; searched on calibration or training batches.
    max_drop: float | None = None
    lam: float | None = None  # the price of a bit, in units of the weighted error
    weigh: str = "auto"  # an error's weight: "output", "inputs" or "none"; auto: output if there is data
    # What shares a step: "tensor", "channel", "input", "both" (row times column); auto: the cheapest.
    per: str = "auto"
    damp: float = 0.05  # share of the mean curvature added to it, for directions that the data did not show
    passes: int = 1  # over the calibration batches, for the curvature: more give less noise
    vectors: bool = True  # biases, norms and positions too, if where is "*"
    where: str | tuple[str, ...] = "*"  # which sites, as a glob; "!" excludes

    def __post_init__(self) -> None:
        check_settings(self)
        given = [key for key in TARGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise SettingError(
                f"rdoq: {' and '.join(given)} given, but only one of {', '.join(TARGETS)} can be the target"
            )
        check(self.bits is None or 0 < self.bits <= 16, self, "bits", "it is bits a weight: above 0, to 16")
        check(self.nbytes is None or self.nbytes >= 1, self, "nbytes", "it is a count of bytes: 1 or more")
        check(
            self.max_drop is None or 0 < self.max_drop < math.inf,
            self,
            "max_drop",
            "it is a loss of the metric, above 0: no set of samples shows a loss of 0",
        )
        check(self.lam is None or 0 < self.lam < math.inf, self, "lam", "it is a price: above 0")
        check(0 < self.damp <= 1, self, "damp", "it is a share: 0 < damp <= 1")
        check(self.passes >= 1, self, "passes", "it is a count: 1 or more")
        check_word(self, "weigh", WEIGH)
        check_word(self, "per", ("auto", *PER))
        check_effect(self)

    @property
    def needs(self) -> Needs:
        """Without data, each tensor is rounded by itself, unless all share one budget."""
        if self.max_drop is not None:
            return Needs.MODEL | Needs.TASK | Needs.WHOLE | Needs.SCORES
        if self.weigh not in ("auto", "none"):
            return Needs.MODEL | Needs.TASK | Needs.WHOLE
        return Needs.NOTHING if self.nbytes is None else Needs.WHOLE

    def run(self, view: View) -> Iterator[Group]:
        sites = self.sites(view)
        if self.nbytes is None and self.max_drop is None and self.weighing(view) == "none":
            for number, site in enumerate(sites, 1):
                if site.name not in view.done:
                    yield site_group(site.name, *self.alone(view, site))
                view.observer.progress(number, len(sites), site.name)
            return
        weigh, shown = self.weighing(view), view
        decide = (
            None if self.max_drop is None else deciding(view.task, view.model(), self.max_drop, self.name)
        )
        if decide is not None:
            # Codes fitted to the samples that decide would lose less on them than on others.
            shown = replace(view, maybe_task=decide.rest, statistics={})
        roundings = site_roundings(shown, sites, weigh, self.damp, self.passes)
        lam = self.search(view, roundings, decide=decide)
        events = [event for rounding in roundings for event in self.events(view, rounding, lam)]
        if decide is not None:
            after = {e.site: e.after for e in events if isinstance(e, Edit)}
            events.append(decide.note(view.task, view.model(), view.model(cast(dict[str, Form], after))))
        yield Group("all", tuple(events))

    def sites(self, view: View) -> list[Site]:
        """The weights that `where` picks, and the other parameters if it is "*"."""
        chosen = {site.name for site in view.weights(self.where)}
        # Masks are binary. In a file without its model, a scale may be the scale of codes.
        left = ("mask",) if view.state.given is not None else ("mask", "scale")
        if self.vectors and self.where == "*":
            chosen |= {
                site.name for site in view.sites.values()
                if site.is_parameter and site.kind not in left and 0 not in site.shape
            }  # fmt: skip
        return [site for site in view.sites.values() if site.name in chosen]

    def weighing(self, view: View) -> str:
        """The weighting of errors. RefusedError if it needs data and there is none."""
        if self.weigh == "auto":
            task = view.maybe_task
            has_data = view.state.given is not None and task is not None and task.calibrate is not None
            return "output" if has_data else "none"
        if self.weigh != "none":
            view.task.batches("calibrate")
        return self.weigh

    def alone(self, view: View, site: Site) -> tuple[Edit | Note, ...]:
        """The events of one tensor that is rounded by itself, without data."""
        (rounding,) = site_roundings(view, [site], "none", self.damp)
        return self.events(view, rounding, self.search(view, [rounding], 0 if site.is_weight else MORE))

    def events(self, view: View, rounding: SiteRounding, lam: float) -> tuple[Edit | Note, ...]:
        before = view.form(rounding.site)
        if not rounding.fits:
            return (Note(rounding.site.name, "skipped", rounding.why),)
        after, how, bits = rounding.form(lam, self.per)
        count = max(1, before.decode().numel())
        text = f"{bits / count:.3f} bits a weight expected, lam {lam:.3g}"
        note = Note(rounding.site.name, "done", text, {"bits": round(bits, 1), "lam": lam})
        return Edit(rounding.site.name, before, after, how), note

    def search(
        self, view: View, roundings: list[SiteRounding], more: float = 0.0, decide: Deciding | None = None
    ) -> float:
        """The price that meets the target. `more`: additional bits a weight. `decide`: measures a drop."""
        roundings = [rounding for rounding in roundings if rounding.fits]
        if self.lam is not None or not roundings:
            return self.lam or 0.0
        count = sum(rounding.count for rounding in roundings)

        def bits(lam: float) -> float:
            return sum(rounding.bits(lam, self.per) for rounding in roundings)

        def priced(bits_a_weight: float, near: float = 0.005) -> float:
            start = sum(rounding.price(bits_a_weight) * rounding.count for rounding in roundings) / count
            return least(bits, count * bits_a_weight, start, slope=count / 2, near=near, who=self.name)

        if decide is not None:
            return self.accurate(view, roundings, priced(BEGIN, near=0.2), decide)
        if self.nbytes is not None:
            return self.small(view, roundings, count, priced)
        return priced(more + (BITS if self.bits is None else self.bits))

    def accurate(self, view: View, roundings: list[SiteRounding], start: float, decide: Deciding) -> float:
        """The largest price at which the metric loses at most `max_drop`: see drop_search.py."""
        unit = view.task.scored.unit

        def measured(lam: float) -> Drop:
            fall = decide.drop(view.model(self.forms(roundings, lam)))
            view.observer.progress(0, 1, f"lam {lam:.3g} loses {fall.amount:+.4g} {unit}")
            return fall

        def ends(lam: float) -> tuple[float, float]:
            fall = measured(lam)
            return fall.amount, fall.high

        lam = largest(ends, decide.limit, start, who=self.name, unit=unit)
        # The price is that of a fit. The codes themselves must lose no more either.
        while measured(lam).amount > decide.limit:
            lam *= LOWER
        return lam

    def small(
        self, view: View, roundings: list[SiteRounding], count: int, priced: Callable[[float], float]
    ) -> float:
        """The price at which the coded file fits the budget: predicted, measured and corrected."""
        names = {rounding.site.name for rounding in roundings}
        fixed = {name: form for name, form in view.forms.items() if name not in names}
        rest = coded_nbytes(fixed)
        budget = (self.nbytes or 0) - rest
        wanted, best, found = 8 * budget / count, None, 0
        for _ in range(TRIES):
            if wanted <= 0:
                break
            lam = priced(wanted)
            found = coded_nbytes(self.forms(roundings, lam))
            view.observer.progress(0, 1, f"lam {lam:.3g} gives {found + rest} bytes")
            if found <= budget:
                best = lam
                if found >= 0.99 * budget:
                    break
            wanted *= min(1.5, 0.998 * budget / found)
        if best is None:
            raise RefusedError(
                f"rdoq: nbytes={self.nbytes} is too small: tensors that stay as they are have {rest} bytes, "
                f"and the others need {found or 'more'}. Allow more bytes, or prune first."
            )
        return best

    def forms(self, roundings: list[SiteRounding], lam: float) -> dict[str, Form]:
        return {rounding.site.name: rounding.form(lam, self.per)[0] for rounding in roundings}


def coded_nbytes(forms: Mapping[str, Form]) -> int:
    """Bytes of these forms in a file after the entropy step."""
    coded = [Entropy().code(form) for form in forms.values()]
    return sum(form.nbytes + NODE * sum(1 for _, node in form.walk() if node.arrays()) for form in coded)
