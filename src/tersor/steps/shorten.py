"""Shorten: remove whole residual branches, so that the network has fewer layers.

branch   f in y = x + f(x), from the graph of the forward (model/branches.py); without it y = x
choose   greedily: the branch whose zeros move the outputs least, for what it saves; then again
cut      stock modules take the place of its layers (model/bypass.py); proved against the model with zeros on
         the edge where the branch ended
repair   the layers after it are refitted by least squares on calibration batches, without labels
latency  costs are measured times of operators; then the network itself is timed beside the whole one, and
         more branches go until its time fits. Branches are coarse: the nearest point is taken, and named
Damage is E |y - y'|^2 / E |y|^2 of the model's outputs on calibration batches: no labels, no loss. Branches
that a large one, taken after them, makes needless come back.
Sources: Veit 2016 (residual networks lose a branch without collapse), ShortGPT (Men 2024).
Cost: for each removed branch one trace, and a pass over the calibration batches for each branch that is left.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import RefusedError, counted
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.branches import Branch
from tersor.model.bypass import Plan
from tersor.model.channels.groups import removal
from tersor.model.channels.reconstruct import Layer
from tersor.model.output_comparison import Squares
from tersor.model.outputs import tensors_of
from tersor.model.zeroed_edges import with_zeros
from tersor.record.events import Group, Note
from tersor.runtimes import MOST_THREADS, check_runtime
from tersor.runtimes.latency_table import ORT
from tersor.setting_effects import Above, Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.branch_costs import Found
from tersor.steps.correction import corrected
from tersor.steps.retrain import Retrain
from tersor.steps.slim_latency import Stopwatch
from tersor.steps.units import OUTSIDE, readers_of

TRIES = 4  # choices of a round's branches, each without those whose proof failed before
OF = ("macs", "parameters", "bytes", "branches", "latency")
WITHIN = 0.05  # of an asked time
NO_MODULES = "no branch ends in an addition of something computed from its other term"


@dataclass(frozen=True, kw_only=True)
class Shorten(Retrain):
    """Remove whole residual branches, so that the network has fewer layers."""

    name: ClassVar[str] = "shorten"
    only: ClassVar[Only] = {
        "rounds": {"epochs": Above(0)},
        **dict.fromkeys(("runtime", "threads", "batch"), {"of": ("latency",)}),
    }
    keep: float = 0.75  # share kept of what `of` names, 0 < keep < 1
    of: str = "macs"  # "macs", "parameters", "bytes" (as stored now), "branches", "latency" (measured)
    correct: bool = True  # refit the layers after a removed branch, and batch norms, without labels
    rounds: int = 1  # times to remove and train, until keep is reached
    unmet: str = "refuse"  # if the branches that may go do not suffice: "refuse", or take the "nearest"
    runtime: str = "onnxruntime"  # that latency is measured in
    threads: int = 1  # of the runtime
    batch: int = 1  # samples a call

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.keep < 1, self, "keep", "it is the share kept: 0 < keep < 1")
        check_word(self, "of", OF)
        check(self.rounds >= 1, self, "rounds", "it is a count: 1 or more")
        check_word(self, "unmet", ("refuse", "nearest"))
        check(1 <= self.threads <= MOST_THREADS, self, "threads", f"it is a count: 1 to {MOST_THREADS}")
        check(self.batch >= 1, self, "batch", "it is a count of samples: 1 or more")
        check_effect(self)
        if self.of == "latency":
            check_word(self, "runtime", (ORT,))  # in which single operators can be timed
            check_runtime(self.runtime, self.name)

    @property
    def needs(self) -> Needs:
        return super().needs | Needs.MODEL | Needs.TASK | Needs.WHOLE

    def run(self, view: View) -> Iterator[Group]:
        now = view
        watch = Stopwatch(view, self) if self.of == "latency" else None
        work = Work({site.name for site in view.weights(self.where)}, Found(view, self).cost, watch)
        for number in range(1, self.rounds + 1):
            begin, share = now, self.keep ** (number / self.rounds)
            now, found = yield from self.cut(begin, work, share, f"cut {number}")
            if begin is now:
                continue
            if self.correct:
                readers = readers_of(removal(found.walk, {})[0], now)
                layers = [
                    Layer(r.path, torch.arange(len(r.rows)), r.norm) for r in readers if r.path in work.after
                ]
                fixed = corrected(f"corrected {number}", begin, now, layers, self.still(now))
                yield fixed
                now = now.after(fixed)
            if self.epochs:
                text = f"shorten {number}/{self.rounds}"
                moved, facts = now.train(self.plan(), text=text, key=f"shorten {number}")
                note = Note("", "trained", f"{self.epochs:g} epochs", facts)
                tuned = Group(f"tuned {number}", (*now.edits(moved), note, *self.stayed(now)))
                yield tuned
                now = now.after(tuned)
        yield Group("notes", (*silent(now, found, work), self.budget(found, work)))

    def cut(
        self, begin: View, work: Work, share: float, key: str
    ) -> Generator[Group, None, tuple[View, Found]]:
        """Remove branches until a share is left: (the view after it, its branches). All of a round are one
        group, with one proof; if it fails they are proved one by one."""
        now = begin
        for number in range(TRIES):
            base = now
            taken = self.chosen(begin, base, work, share)
            now = after(base, taken)
            found = Found(now, self)
            if not taken:
                break
            work.after |= set[str]().union(*(each.after for each in taken))
            parts = [each.group for each in taken]
            whole = joined(f"{key}.{number}" if number else key, parts)
            yield whole
            if whole.key not in begin.refused:
                work.gone += [part.key for part in parts]
                break
            now = base
            for part in parts:
                yield part
                if part.key in begin.refused:
                    work.left[part.key] = begin.refused[part.key]
                else:
                    work.gone.append(part.key)
                    now = now.after(part)
        self.met(found, work, share, now)
        return now, found

    def chosen(self, begin: View, base: View, work: Work, share: float) -> list[Taken]:
        """The branches to remove from `base`."""
        found, now, taken, target = Found(base, self), base, list[Taken](), share * work.start
        while True:
            while found.cost > target and (least := self.least(begin, found, work, target)) is not None:
                group, branch = removed(now, *least), least[0]
                taken.append(Taken(group, found.saves(branch), found.after(branch)))
                now = now.after(group)
                found = Found(now, self)
            enough = spared(taken, target - found.cost)
            if work.watch is None or not taken:
                return enough
            time = work.watch.share(now)
            if time <= share * (1 + WITHIN) or found.cost > target:  # it fits, or there are no more branches
                break
            target = found.cost * share / time  # the table's sum leaves out what is between operators
        # By the clock: what the table says is needless, and the last branch, may be too much.
        tried = [(time, taken)]
        for fewer in (enough, taken[:-1]):
            if 0 < len(fewer) < len(taken):
                tried.append((work.watch.share(after(base, fewer)), fewer))
        if self.unmet == "refuse":  # none that is slower than asked
            tried = [each for each in tried if each[0] <= share * (1 + WITHIN)] or tried[:1]
        return min(tried, key=lambda each: abs(math.log(each[0] / share)))[1]

    def least(
        self, begin: View, found: Found, work: Work, target: float
    ) -> tuple[Branch, Plan, float] | None:
        """(the branch that does the least damage for what it saves, how to remove it, the damage)."""
        free = [b for b in found.branches if b.name not in work.left and found.saves(b) > 0]
        free = [b for b in free if found.weights(b) <= work.chosen]
        if not free:
            return None
        damage = damages(begin, found, free)
        need = found.cost - target  # saving more than that is worth nothing
        for branch in sorted(free, key=lambda b: damage[b.name] / min(found.saves(b), need)):
            plan = found.plan(branch)
            if not isinstance(plan, str):
                return branch, plan, damage[branch.name]
            work.left[branch.name] = plan
        return None

    def met(self, found: Found, work: Work, asked: float, now: View) -> None:
        """Refuse a budget that the branches that may go do not reach."""
        work.left_over = share = work.share(found, now)
        if (work.gone and share <= asked * (1 + (WITHIN if work.watch else 0))) or self.unmet == "nearest":
            return
        why = reasons(found, work)
        if not work.gone:
            raise RefusedError(f"shorten: there is no residual branch to remove: {why or NO_MODULES}")
        keep = min(int(100 * share) + 1, 99) / 100
        raise RefusedError(
            f"shorten: {self.of}: without all branches that may go {share:.1%} stays, {self.keep:.1%} asked. "
            f"Give keep={keep:g}, or unmet=nearest{f'. {why}' if why else ''}"
        )

    def budget(self, found: Found, work: Work) -> Note:
        share, before, after = work.left_over, work.start, found.cost
        text = (
            f"{counted(len(work.gone), 'branch')} removed; {self.of}: {share:.1%} kept, {self.keep:.1%} asked"
        )
        if work.watch is not None:
            before, after = work.watch.ms, share * work.watch.ms
            text += f"; {before:.4f} ms before, {after:.4f} after in {self.runtime}, batch {self.batch}"
            if abs(share / self.keep - 1) > WITHIN:
                text += "; branches are coarse, and this is the nearest point"
        if why := reasons(found, work):
            text += f". {why}"
        facts = {"of": self.of, "before": before, "after": after, "branches": len(work.gone)}
        return Note("", "budget", text, facts, timed=work.watch is not None)


@dataclass
class Work:
    """What is known over the rounds."""

    chosen: set[str]  # the weights that `where` picks
    start: float  # the cost at the beginning
    watch: Stopwatch | None = None  # with the model at the beginning, if the budget is of time
    gone: list[str] = field(default_factory=list)  # names of removed branches
    left: dict[str, str] = field(default_factory=dict)  # names of branches that cannot be removed -> why
    after: set[str] = field(default_factory=set)  # modules that run on what a removed branch was added to

    left_over: float = 1.0  # the share of the cost, at the end

    def share(self, found: Found, now: View) -> float:
        """The share of the cost that is left; a model without branches has none of them."""
        if self.watch is not None:
            return self.watch.share(now)
        return found.cost / self.start if self.start else 1.0


class Taken(NamedTuple):
    """A branch that was chosen."""

    group: Group
    saves: float
    after: set[str]  # modules that run on what it was added to


def damages(begin: View, found: Found, free: list[Branch]) -> dict[str, float]:
    """For each branch how far zeros in its place move the outputs from those at the round's beginning."""
    task, edges = begin.part.task, set[str]()
    given, model = begin.part.plain(), with_zeros(found.view.plain(), edges)
    error = {branch.name: Squares() for branch in free}
    with evaluating(given), evaluating(model), steady(task.calibrate):
        for number, batch in enumerate(task.batches(task.shown)):
            here = move(batch, device_of(model))
            wanted = [x.double() for x in tensors_of(task.answer(given, here)) if x.is_floating_point()]
            for branch in free:
                edges.clear()
                edges.add(branch.edge)
                got = [x.double() for x in tensors_of(task.answer(model, here)) if x.is_floating_point()]
                error[branch.name].add(wanted, got)
            begin.observer.progress(number, number + 1, f"{len(free)} branches")
    return {name: squares.share() for name, squares in error.items()}


def removed(view: View, branch: Branch, plan: Plan, damage: float) -> Group:
    """The events that remove a branch. The key is its name."""
    paths = tuple(f"{change.module}." for change in plan)
    names = [name for name in branch.tensors if name in view.sites and name.startswith(paths)]
    why = f"removed with the branch of {branch.name}"
    told = [Note(name, "done", why) for name in names if view.sites[name].is_weight]
    what = ", ".join(f"{change.module} -> {change.stock}" for change in plan)
    text = f"the branch of {branch.name}: {what}; it moved the outputs by {damage**0.5:.1%}"
    note = Note("", "removed", text, {"branch": branch.name, "damage": damage})
    return Group(branch.name, (*plan, *told, note), "zeroed", (branch.edge,))


def after(view: View, taken: Iterable[Taken]) -> View:
    """The view without these branches."""
    for each in taken:
        view = view.after(each.group)
    return view


def spared(taken: list[Taken], room: float) -> list[Taken]:
    """The branches that have to go: a large one, taken late, may make earlier ones needless. The largest that
    fit in the budget stay."""
    needed = list(taken)
    for each in sorted(taken[:-1], key=lambda each: -each.saves):
        if each.saves <= room:
            needed.remove(each)
            room -= each.saves
    return needed


def joined(key: str, parts: list[Group]) -> Group:
    """One group with one proof of all."""
    events = [event for part in parts for event in part.events]
    return Group(key, tuple(events), "zeroed", tuple(edge for part in parts for edge in part.zeros))


def reasons(found: Found, work: Work) -> str:
    """Why branches stay that may not go, by name."""
    every = {**found.no, **work.left}
    outside = [b.name for b in found.branches if not found.weights(b) <= work.chosen]
    every |= dict.fromkeys(outside, "where leaves out some of its weights")
    return "; ".join(f"{name}: {why}" for name, why in list(every.items())[:6])


def silent(view: View, found: Found, work: Work) -> Iterator[Note]:
    """A note on each weight that is still there."""
    of = {name: branch.name for branch in found.branches for name in branch.tensors}
    for name in [name for name in view.sites if name in work.chosen]:
        if not view.inside(name):
            yield Note(name, "skipped", OUTSIDE)
        elif (branch := of.get(name)) is None:
            yield Note(name, "skipped", "it is in no residual branch that can be removed")
        else:
            yield Note(
                name, "skipped", f"its branch, of {branch}, stays: {work.left.get(branch, 'the budget')}"
            )
