"""Balance: scales of channels between layers, so that integers fit the activations between them.

W1' = s W1, b1' = s b1, W2' = W2 / s      maths/channel_balance.py; which layers: model/scaling_streams.py
The outputs on the calibration batches stay the same up to float rounding, which is checked. Below a relu6 or
clamp channels keep room for other data (channel_balance.room), where they would be clipped. Streams whose
noise does not shrink to WORTH are left alone. Cost: one pass over the calibration batches, two for the check.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor

from tersor.core.view import View
from tersor.encode import coded_like
from tersor.errors import RefusedError, counted, few
from tersor.forms import Form, uncoded
from tersor.maths.channel_balance import Reader, balanced, room
from tersor.model.batches import device_of, move
from tersor.model.channel_values import ChannelValues, channel_values
from tersor.model.example import example_inputs
from tersor.model.scaled_rows import along, multiplied, widened
from tersor.model.scaling_streams import Stream, scaling_streams
from tersor.record.events import Edit, Group, Note
from tersor.steps.same_function import ROUNDING, difference

WORTH = 0.75  # of the noise: less must be left


def channels_balanced(
    view: View, edges: Iterable[str], chosen: set[str], bits: int
) -> Generator[Group, None, View]:
    """The group that balances streams whose tensors have grids on these edges; the view after it."""
    part = view.part
    model = part.plain()
    inputs = move(example_inputs(part.task, model), device_of(model))
    try:
        streams, left = scaling_streams(model, inputs)
    except RefusedError as error:
        yield not_balanced(f"the graph cannot be followed: {error}")
        return view
    grids = set(edges)
    fits = [stream for stream in streams if suits(view, stream, chosen) and grids & {*stream.edges}]
    axes = {
        name: axis for stream in fits for name, axis in stream.edges.items()
        if name in grids or stream.top < math.inf  # what relu6 reads, too
    }  # fmt: skip
    values = channel_values(model, part.task, axes) if axes else {}
    factors, gains = dict[str, Tensor](), dict[str, float]()
    for stream in fits:
        seen = {name: values[name] for name in stream.edges if name in values}
        if found := scales_of(view, stream, seen, grids, bits):
            s, gain = found
            gains[stream.makers[0][0]] = round(gain, 4)
            for name, whole in multipliers(view, stream, s).items():
                factors[name] = factors.get(name, torch.ones((), dtype=torch.float64)) * whole
    events = [
        Edit(name, view.form(name), cast(Form, scaled(view, name, whole)), "refine")
        for name, whole in factors.items()
    ]
    if not events:
        return view
    text = f"{counted(len(gains), 'set')} of channels with scales that integers fit better"
    text += "; the outputs of these layers keep theirs: " + few(map(": ".join, left.items())) if left else ""
    note = Note("", "balanced", text, {"noise": gains, "left": left})
    group = Group("balanced", (*events, note), "runs")
    if (moved := difference(view, group)) > ROUNDING:
        yield not_balanced(f"others move the outputs by {moved:.1g} of the largest")
        return view
    yield group
    return view if group.key in view.refused else view.after(group)


def not_balanced(why: str) -> Group:
    return Group("not balanced", (Note("", "balanced", f"channels keep their scales: {why}", {"noise": {}}),))


def suits(view: View, stream: Stream, chosen: set[str]) -> bool:
    """Whether the layers of a stream may be scaled: chosen, not tied, stored in forms that can be."""
    names = {name for names in stream.makers for name in names} | {read.weight for read in stream.readers}
    weights = {names[0] for names in stream.makers} | {read.weight for read in stream.readers}
    tied = {*view.state.aliases, *view.state.aliases.values()}
    return (
        weights <= chosen and names.isdisjoint(tied)
        and all(view.inside(name) and scaled(view, name, torch.ones(())) is not None for name in names)
    )  # fmt: skip


def scales_of(
    view: View, stream: Stream, seen: Mapping[str, ChannelValues], grids: set[str], bits: int
) -> tuple[Tensor, float] | None:
    """(the scales of the channels, the noise that is left), if that is worth it. `seen`: by edge."""
    values = [each for name, each in seen.items() if name in grids]
    if not values:
        return None
    most = None
    if stream.top < math.inf:
        rooms = [room(stream.top, v.high, v.mean, v.power) for v in seen.values()]
        most = torch.stack(rooms).amin(0)
    readers = [Reader.of(view.form(r.weight).decode(), r.groups, r.block) for r in stream.readers]
    power = torch.stack([each.power for each in values]).mean(0)
    s, gain = balanced([(v.low, v.high) for v in values], power, readers, bits, most)
    return (s, gain) if gain < WORTH else None


def multipliers(view: View, stream: Stream, s: Tensor) -> dict[str, Tensor]:
    """What multiplies each tensor, in a shape that broadcasts."""
    found: dict[str, Tensor] = {}
    for names in stream.makers:
        for name in names:
            found[name] = along(s, 0, len(view.shape(name)))
    for read in stream.readers:
        columns = read.columns(1 / s, tuple(view.shape(read.weight)))
        found[read.weight] = found.get(read.weight, torch.ones((), dtype=torch.float64)) * columns
    return found


def scaled(view: View, name: str, whole: Tensor) -> Form | None:
    """A weight's form times factors of any shape that broadcasts; None if it cannot hold them."""
    form = view.form(name)
    after = multiplied(widened(uncoded(form), view.sites[name].torch_dtype), whole.double())
    return None if after is None else coded_like(after, form)
