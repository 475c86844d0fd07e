"""Joint rounding: the codes of all layers of a block, learned together by the block's float output.

min E |f_q(x) - f(y)|^2     f_q the block with rounded weights, and activations where they have grids
                            y what the float block reads; x what it reads in the rounded network, mixed with y
Block-wise reconstruction (BRECQ, Li 2021). Rounding of activations is dropped at random, number by number,
at the block's inputs and inside (QDrop, Wei 2022). Which of two levels each weight takes is learned softly
and settled in STAGES: model/rounding_part.py. Scales and biases are learned with it.
Cost: STEPS forward and backward passes of the block on a chunk of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersor.model.batches import evaluating, steady
from tersor.model.block_calls import Chunk, answer, mixed
from tersor.model.part import Call
from tersor.model.rounding_part import RoundingPart
from tersor.model.simulate import Simulated
from tersor.model.trainable_parts import Part
from tersor.model.watch import WatchedRun, running

STEPS = 800
STAGES = 20  # in which weights are settled
ENDED = 0.95  # of the steps: then all weights are settled, and only scales and biases move
RATE = 0.03  # of Adam, for what chooses between two codes
STRETCH = 1e-3  # for logarithms of scales
SHIFT = 1e-3  # for biases, as a share of the spread of their layer's outputs
DROP = 0.5  # of the numbers on an edge: they stay as they are in a step


@dataclass(frozen=True, eq=False)
class JointRounding:
    """A block of a network that is being rounded, and what it should compute."""

    alone: nn.Module  # the block in the rounded network, with the weights that it has so far
    parts: Mapping[str, Part]  # of its weights and biases, by their names in it
    spreads: Mapping[str, float]  # the spread of the outputs that each of these biases is added to
    chunks: Sequence[Chunk]
    grids: Simulated | None = None  # the simulation that the block is in

    def run(self, seed: int) -> tuple[float, float]:
        """Learn the parts. Returns the mean square errors of the block's output over all chunks: with the
        weights that `alone` has, and with the learned ones."""
        with evaluating(self.alone), steady():
            old = self.error({})
            if old > 0:
                self.learn(old, torch.Generator().manual_seed(seed))
            return old, self.error(self.values())

    def differentiable(self) -> bool:
        """Whether gradients pass through the block: not if it computes without them, or changes in place
        what they need."""
        chunk = self.chunks[0]
        try:
            with evaluating(self.alone), steady(), torch.enable_grad():
                squares(self.answer(self.values(), chunk.rounded), chunk).backward()
        except RuntimeError:
            return False
        finally:
            for part in self.parts.values():
                part.zero_grad()
        return True

    def values(self) -> dict[str, Tensor]:
        own = dict(self.alone.named_parameters())
        return {name: part.value().to(own[name].dtype) for name, part in self.parts.items()}

    def learn(self, unit: float, generator: torch.Generator) -> None:
        """`unit`: of the error, so that its gradients are far above what Adam takes for 0."""
        every = [module for part in self.parts.values() for module in part.modules()]
        soft = [module for module in every if isinstance(module, RoundingPart)]
        adam = torch.optim.Adam([
            {"params": [part.v for part in soft], "lr": RATE},
            {"params": [part.stretch for part in soft], "lr": STRETCH},
            *(
                {"params": [*self.parts[name].parameters()], "lr": SHIFT * spread}
                for name, spread in self.spreads.items()
            ),
        ])  # fmt: skip
        stage = 0
        for step in range(STEPS):
            now = min(STAGES, int((step + 1) / (ENDED * STEPS) * STAGES))
            if now > stage:
                stage = now
                for part in soft:
                    part.settle(1 - (1 - stage / STAGES) ** 2)
            chunk = self.chunks[int(torch.randint(len(self.chunks), (), generator=generator))]
            with torch.enable_grad():
                found = self.answer(self.values(), mixed(chunk, DROP, generator), generator)
                loss = squares(found, chunk) / unit
                loss.backward()
            adam.step()
            adam.zero_grad()

    def error(self, values: dict[str, Tensor]) -> float:
        """Over all chunks, on the inputs that the rounded network gives. No gradients."""
        sizes = [each.target.numel() for each in self.chunks]
        every = [float(squares(self.answer(values, each.rounded), each)) for each in self.chunks]
        return sum(n * e for n, e in zip(sizes, every, strict=True)) / max(sum(sizes), 1)

    def answer(
        self, values: dict[str, Tensor], call: Call, generator: torch.Generator | None = None
    ) -> Tensor:
        """The block's output with these tensors. With a generator, grids leave out numbers at random."""
        with self.rounding(generator):
            return answer(lambda *args, **kwargs: functional_call(self.alone, values, args, kwargs), call)

    def rounding(self, generator: torch.Generator | None) -> AbstractContextManager[Any]:
        grids = self.grids
        if grids is None:
            return nullcontext()

        def see(name: str, x: Tensor) -> Tensor:
            y = grids.see(name, x)
            if generator is None or y is x:
                return y
            return torch.where(torch.rand(x.shape, generator=generator).to(x.device) < DROP, x, y)

        return running(WatchedRun(see, None, False, grids.table))


def squares(found: Tensor, chunk: Chunk) -> Tensor:
    """The mean square error of an output, without padding."""
    gap = found.float() - chunk.target.float()
    return (gap if chunk.counts is None else gap[chunk.counts]).square().mean()
