"""Features: train the outputs of a student's layers to match those of a teacher's layers.

The losses are those of feature_loss.py. One of them maps the student's channels to the teacher's width with a
linear map, which is trained too and removed afterwards. For tokens [B, T, C] padding is left out, by the
batch's attention mask. Cost: one batch through both models beforehand, for the shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.model.batches import device_of, evaluating, seeded, shapes
from tersor.model.feature_loss import feature_loss, match
from tersor.model.logits import is_encoder_decoder, unpadded
from tersor.model.output_comparison import once
from tersor.model.outputs import tensors_of
from tersor.model.task import Task
from tersor.model.trainable_forms import TrainableForms


def pairs_of(text: str) -> list[tuple[str, str]]:
    """(student's layer, teacher's layer) for each word of "a, b=teacher.b"; a single name means both."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    halves = (word.partition("=") for word in words)
    return [(mine.strip(), theirs.strip() if equals else mine) for mine, equals, theirs in halves]


class AxisLinear(nn.Linear):
    """A linear map along one axis."""

    def __init__(self, axis: int, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(self.axis, -1)).movedim(-1, self.axis)


class Features:
    """The outputs of the named layers of both models in the last forward, and the maps between them."""

    def __init__(self, pairs: list[tuple[str, str]], kind: str = "outputs"):
        self.pairs, self.kind = pairs, kind
        self.mine: list[list[Tensor]] = [[] for _ in pairs]  # a layer may run more than once
        self.theirs: list[list[Tensor]] = [[] for _ in pairs]
        self.maps = nn.ModuleDict()

    def clear(self) -> None:
        for found in (*self.mine, *self.theirs):
            found.clear()

    def distance(self, batch: Any = None, output: Any = None) -> list[Tensor]:
        """The losses, one per call of a layer, without the batch's padding."""
        found = []
        for number, (mine, theirs) in enumerate(self.checked()):
            along = self.maps[f"{number}"] if f"{number}" in self.maps else nn.Identity()
            pair = self.pairs[number]
            for x, y in zip(mine, theirs, strict=True):
                mask = token_mask(pair[0], x, batch, output)
                found.append(feature_loss(self.kind, pair, x, y, along=along, mask=mask))
        return found

    def checked(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The collected outputs, pair by pair. RefusedError if a layer was not called, or the two layers of a
        pair were called a different number of times."""
        for (a, b), mine, theirs in zip(self.pairs, self.mine, self.theirs, strict=True):
            uncalled = [name for name, found in ((a, mine), (b, theirs)) if not found]
            if uncalled:
                raise RefusedError(
                    f"features: {uncalled[0]} exists, but the model's forward does not call it. Name a layer "
                    f"that is called"
                )
            if len(mine) != len(theirs):
                raise RefusedError(
                    f"features: {a} runs {len(mine)} times, the teacher's {b} {len(theirs)} times. Name "
                    f"layers that run equally often"
                )
            yield mine, theirs

    @contextlib.contextmanager
    def beside(self, trainable: TrainableForms) -> Iterator[None]:
        """Attach the maps to the trained model during the context, so that they are among its parameters, are
        in its checkpoints and move with it. The folded forms do not contain them."""
        if self.maps:
            trainable.maps = self.maps.to(device_of(trainable))
        try:
            yield
        finally:
            if self.maps:
                del trainable.maps

    @contextlib.contextmanager
    def catching(self, trainable: TrainableForms, teacher: nn.Module | None) -> Iterator[None]:
        """Collect the layers' outputs during the context."""
        hooks = []
        sides = [(trainable.net, 0, self.mine), *([(teacher, 1, self.theirs)] if teacher is not None else [])]
        try:
            for net, side, lists in sides:
                for pair, found in zip(self.pairs, lists, strict=True):
                    layer = net.get_submodule(pair[side])
                    hooks.append(layer.register_forward_hook(
                        lambda module, args, output, found=found: found.append(first_tensor(output))
                    ))  # fmt: skip
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.clear()


def first_tensor(output: object) -> Tensor:
    """A layer's output; if it has several tensors, the first one of floats."""
    if isinstance(output, Tensor):
        return output
    found = next((tensor for tensor in tensors_of(output) if tensor.is_floating_point()), None)
    if found is None:
        raise RefusedError(f"features: a layer returns {shapes(output)}, no tensor of floats. Name another")
    return found


def token_mask(layer: str, x: Tensor, batch: Any, output: Any = None) -> Tensor | None:
    """Which tokens of [B, T, C] are not padding, bool [B, T]; None if the batch has no mask that fits."""
    if x.ndim != 3:
        return None
    decoder = "encoder" not in layer.split(".") and is_encoder_decoder(output, batch)
    mask = unpadded(batch, tuple(x.shape[:2]), x.device, decoder=decoder)
    return None if mask is None or bool(mask.all()) else mask


def features_of(
    text: str, trainable: TrainableForms, teacher: nn.Module | None, task: Task, seed: int, *,
    kind: str = "outputs",
) -> Features:  # fmt: skip
    """The features that a setting names, with the maps they need. `kind`: of the loss. RefusedError if two
    layers' outputs cannot be compared."""
    found = Features(pairs_of(text) if teacher is not None else [], kind)
    if not found.pairs:
        return found
    with found.catching(trainable, teacher), evaluating(trainable), torch.no_grad():
        for model in (trainable, teacher):
            once(task, model, "train")  # type: ignore[arg-type]
        if kind != "outputs":
            found.distance()
            return found
        shapes = [
            [(tuple(x.shape), tuple(y.shape)) for x, y in zip(*pair, strict=True)] for pair in found.checked()
        ]
    for number, (pair, runs) in enumerate(zip(found.pairs, shapes, strict=True)):
        differ = {(how.axis, how.widths) for how in (match(*pair, *run) for run in runs)}
        axis, widths = differ.pop()
        if differ and (widths or any(other for _, other in differ)):
            raise RefusedError(
                f"features: {pair[0]} and the teacher's {pair[1]} run {len(runs)} times with outputs of "
                f"different widths. Name layers of one width"
            )
        if widths is not None:
            with seeded(seed + number):
                found.maps[f"{number}"] = AxisLinear(axis, *widths)
    return found
