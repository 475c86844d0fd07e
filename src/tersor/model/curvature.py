"""Curvature: how much the model's output changes with a weight, as a Kronecker product for each weight.

E |dy|^2 ~ tr(F dW H dW^T)      dW [O, I] a small change; F = E S S^T [O, O], H = E S^T S [I, I] / tr(F)
S = gradient of <v, y> by W     v random signs r (Hutchinson 1989); for logits with probabilities p
                                v = sqrt(p) * r - p * <sqrt(p), r>, so that E v v^T = diag(p) - p p^T
For logits this is the Fisher matrix (Martens 2020, factored as in Shampoo), as if labels were drawn from the
model's output, but with less variance: a class of probability 1 % counts a little in every draw, instead of
much in one draw of a hundred.
Cost: a forward and a backward pass over the calibration batches, and two products of O x I a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tersor.boundary import no_memory
from tersor.errors import RefusedError, first_line
from tersor.forms.form import to_rows
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.logits import first_tensor
from tersor.model.sites import Site
from tersor.model.task import Task

WIDEST = 4096  # rows or columns; a wider side gets a diagonal factor, to save memory
AT_ONCE = 1 << 30  # bytes of factors held in one pass over the batches
FEWEST = 24  # least number of gradients: a few batches are used again with new random signs
RAREST = 0.01  # least number of uses assumed for an embedding row, in batches


class Curvature(NamedTuple):
    """The two factors of one weight. A factor with a side above WIDEST is its diagonal only."""

    rows: Tensor  # F, float32 [O, O] or [O]
    columns: Tensor  # H, float32 [I, I] or [I]


def curvatures(
    model: nn.Module, task: Task, sites: Iterable[Site], *, passes: int = 1, widest: int | None = None
) -> dict[str, Curvature]:
    """The curvature of each site's weight, by site name, from `passes` passes over the calibration batches.
    `model` must be a copy: its requires_grad flags are changed. Factors wider than `widest`, or WIDEST, are
    diagonals.

    Weights that no output depends on are left out. Empty if the output has no gradient. RefusedError if the
    model's code allows none: it changes a tensor in place that a gradient needs.
    """
    found, widest = dict[str, Curvature](), WIDEST if widest is None else widest
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # Use the shapes of the model now: a site stores the given shape, before any cut.
    present = [replace(site, shape=shapes[site.name]) for site in sites if site.name in shapes]
    for chunk in chunks(present, widest):
        found |= estimate(model, task, chunk, passes, widest)
    return found


def chunks(sites: list[Site], widest: int) -> Iterator[list[Site]]:
    """Split the sites into chunks whose factors fit in memory together."""
    chunk: list[Site] = []
    room = AT_ONCE
    for site in sites:
        rows, columns = matrix_shape(site)
        size = 4 * sum(n * n if n <= widest else n for n in (rows, columns))
        if chunk and size > room:
            yield chunk
            chunk, room = [], AT_ONCE
        chunk.append(site)
        room -= size
    if chunk:
        yield chunk


def matrix_shape(site: Site) -> tuple[int, int]:
    """(O, I) of a site's weight as a matrix of rows."""
    if len(site.shape) <= 1:
        return 1, math.prod(site.shape)
    return site.shape[site.axis], math.prod(site.shape) // max(site.shape[site.axis], 1)


def estimate(
    model: nn.Module, task: Task, sites: list[Site], passes: int, widest: int
) -> dict[str, Curvature]:
    """The curvature of sites whose factors fit in memory together."""
    parameters = dict(model.named_parameters())
    wanted = {site.name: site for site in sites}
    sums = {name: Sums(site, widest) for name, site in wanted.items()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)
    samples = batches = done = 0
    with evaluating(model), steady(task.calibrate), torch.enable_grad():
        while batches < FEWEST or done < passes:
            for batch in task.batches("calibrate"):
                output = first_tensor(task.answer(model, move(batch, device_of(model))), task.logits)
                if output is None or not output.requires_grad:
                    return {}
                try:
                    probe(output, task).backward()
                except RuntimeError as error:
                    if no_memory(error):
                        raise
                    raise RefusedError(
                        f"curvature: no gradients pass through the model: {first_line(error)}"
                    ) from error
                samples += output.shape[0]
                batches += 1
                for name in wanted:
                    if (gradient := parameters[name].grad) is not None:
                        sums[name].add(gradient, first=done == 0)
                        parameters[name].grad = None
            done += 1
    return {name: total.curvature(samples) for name, total in sums.items() if total.seen}


def probe(output: Tensor, task: Task) -> Tensor:
    """The scalar <v, y>: the second moment of v, its gradient, is the curvature of the output's error."""
    v = torch.randint(0, 2, output.shape, device=output.device).to(output.dtype).mul_(2).sub_(1)
    if isinstance(task.metric, str) and task.metric == "accuracy" and output.ndim == 2:
        probabilities = output.detach().softmax(1)  # [B, K]
        v = v.mul_(probabilities.sqrt())
        v -= probabilities * v.sum(1, keepdim=True)
    return (output * v).sum()


class Sums:
    """The running sums for one weight."""

    def __init__(self, site: Site, widest: int) -> None:
        rows, columns = matrix_shape(site)
        self.site, self.seen = site, False
        # Different inputs use different rows of an embedding, so their errors do not interact.
        full = rows <= widest and site.kind != "embedding"
        self.rows = torch.zeros((rows, rows) if full else (rows,))
        self.columns = torch.zeros((columns, columns) if columns <= widest else (columns,))
        self.uses = torch.zeros(rows)

    def add(self, gradient: Tensor, *, first: bool) -> None:
        s = to_rows(gradient.detach().float().cpu(), self.site.axis)  # [O, I]
        if self.site.kind == "embedding":
            used = s.any(1).nonzero()[:, 0]
            s = s[used]
            self.uses[used] += first  # a repeated pass over the same batches adds no uses
            self.rows[used] += s.square().sum(1)
        else:
            self.rows += s @ s.T if self.rows.ndim == 2 else s.square().sum(1)
        self.columns += s.T @ s if self.columns.ndim == 2 else s.square().sum(0)
        self.seen = self.seen or bool(s.any())

    def curvature(self, samples: int) -> Curvature:
        rows, columns = self.rows / samples, self.columns / samples
        total = (rows.diagonal() if rows.ndim == 2 else rows).sum()  # without the prior for unused rows
        if self.site.kind == "embedding":
            rows = rows + unseen(self.uses) * float(total) / max(float(self.uses.sum()), 1.0)
        # Squares of tiny gradients underflow to 0; then do not divide, which would give NaN.
        return Curvature(rows, columns / total if float(total) != 0 else columns)


def unseen(uses: Tensor) -> float:
    """The uses to add to each row's count, so that all unused rows together weigh as much as the rows used
    once: the Good-Turing estimate of how often an unseen row occurs (Good 1953)."""
    once, never = int((uses == 1).sum()), int((uses == 0).sum())
    return min(max(once / never, RAREST), 1.0) if never else 0.0
