"""Equalize: rescale the channels between two layers, so that one grid for a tensor fits all of its channels.

W1' = W1 / s, b1' = b1 / s, W2' = W2 s      maths/equalization.py; which layers: model/scaling_links.py
Scales are powers of two, so the outputs are the same bits; the executor compares them anyway. Data-free.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from tersor.core.view import View
from tersor.encode import coded_like
from tersor.errors import RefusedError, counted, few
from tersor.forms import Form, uncoded
from tersor.maths.equalization import equalizing
from tersor.model.batches import device_of, move
from tersor.model.example import example_inputs
from tersor.model.scaled_rows import along, multiplied
from tersor.model.scaling_links import ScalingLink, cells, scaling_links
from tersor.record.events import Edit, Group, Note


def equalized(view: View, chosen: set[str]) -> Generator[Group, None, View]:
    """The groups that equalize links among the chosen weights; the view after them."""
    part = view.part
    model = part.plain()
    try:
        links, left = scaling_links(model, move(example_inputs(part.task, model), device_of(model)))
    except RefusedError as error:
        raise RefusedError(f"fold: equalize needs the graph of the forward: {error}") from error
    fits = []
    for link in links:
        if not chosen >= {link.first, link.second}:
            left[link.first] = f"where leaves out {({link.first, link.second} - chosen).pop()}"
        elif None in (scaled(view.form(name)) for name in (link.first, link.second)):
            left[link.first] = "a form of the two cannot be scaled"
        else:
            fits.append(link)
    factors, moved = factors_of(view, fits)
    events: list[Edit] = []
    for name, whole in factors.items():
        if bool((whole != 1).any()) and (form := scaled(view.form(name), whole)) is not None:
            events.append(Edit(name, view.form(name), form, "refine"))
    text = (
        f"{counted(len(fits), 'pair')} of layers with equal ranges of their channels, by powers of two up to "
        f"2^{moved}"
    )
    text += (
        f"; {counted(len(left), 'layer')} without a pair: " + few(f"{k}: {why}" for k, why in left.items())
        if left
        else ""
    )
    facts = {"pairs": len(fits), "largest": moved, "left": left}
    group = Group("equalized", (*events, Note("", "equalized", text, facts)), "same" if events else "")
    yield group
    return view if group.key in view.refused else view.after(group)


def factors_of(view: View, links: list[ScalingLink]) -> tuple[dict[str, Tensor], int]:
    """(what multiplies each weight and bias, the largest power of two)."""
    weights = list(dict.fromkeys(name for link in links for name in (link.first, link.second)))
    reads = {link.second: (link.groups, link.block) for link in links}
    decoded = {name: view.form(name).decode() for name in weights}
    ranges = [cells(decoded[name], *reads.get(name, (1, 1))) for name in weights]
    pairs = [(weights.index(link.first), weights.index(link.second)) for link in links]
    found: dict[str, Tensor] = {}
    powers = equalizing(ranges, pairs)
    for link, power in zip(links, powers, strict=True):
        scale, shape = torch.exp2(power), tuple(decoded[link.second].shape)
        for name, whole in (
            (link.first, along(1 / scale, 0, decoded[link.first].ndim)), (link.bias, 1 / scale),
            (link.second, link.columns(scale, shape)),
        ):  # fmt: skip
            if name is not None:
                found[name] = found.get(name, torch.ones(())) * whole
    return found, int(max([0.0, *(float(p.abs().max()) for p in powers if len(p))]))


def scaled(form: Form, whole: Tensor | float = 1.0) -> Form | None:
    """The form times factors of any shape that broadcasts; None if it cannot hold them."""
    after = multiplied(uncoded(form), torch.as_tensor(whole, dtype=torch.float64))
    return None if after is None else coded_like(after, form)
