"""Shape rules: views, slices, joins and whatever else only moves elements, and constants.

Permutations reorder labels, slices and splits cut their arrays, cat appends them; merging and splitting of
dimensions is in reshape.py. Indices that are named one by one, padded or rolled are never cut.
"""

from __future__ import annotations

import numpy as np

from tersor.model.channels.atoms import Label
from tersor.model.channels.call import Call, Labels, NoRuleError, elementwise, tensors
from tersor.model.channels.reshape import merged, parted, reshaped


def same(call: Call) -> Labels:
    return list(call.x)


def broadcast(call: Call) -> Labels:
    labels = [label for value in call.given.values() for label in tensors(value)]
    return elementwise(call.atoms, labels, call.shape)


def pooled(call: Call) -> Labels:
    """Pooling and resizing of the last dimensions."""
    space = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 0)
    if not space:
        raise NoRuleError(call.name)
    call.atoms.freeze_all([call.x[-space:]], f"{call.name} slides over it")
    shapes = call.shape if isinstance(call.shape, list) else [call.shape]
    labels: list[Label] = [[*call.x[:-space], *call.other(shape[-space:])] for shape in shapes]
    return labels if isinstance(call.shape, list) else labels[0]


def reshape(call: Call) -> Labels:
    return reshaped(call.atoms, call.x, call.shape)


def permute(call: Call) -> Labels:
    return [call.x[int(d) % len(call.x)] for d in call.given["dims"]]


def transpose(call: Call) -> Labels:
    found = list(call.x)
    if len(found) < 2:
        return found
    pair = [int(call.given[key]) for key in ("dim0", "dim1", "axis0", "axis1") if key in call.given] or [
        -1,
        -2,
    ]
    found[pair[0]], found[pair[1]] = found[pair[1]], found[pair[0]]
    return found


def reverse(call: Call) -> Labels:
    return call.x[::-1]


def moved(call: Call) -> Labels:
    source, target = ([k] if isinstance(k := call.given[key], int) else list(k)
                      for key in ("source", "destination"))  # fmt: skip
    n = len(call.x)
    place = {t % n: s % n for s, t in zip(source, target, strict=True)}
    rest = iter(d for d in range(n) if d not in place.values())
    return [call.x[place[d] if d in place else next(rest)] for d in range(n)]


def unsqueeze(call: Call) -> Labels:
    at = call.dim(of=len(call.x) + 1)
    return [*call.x[:at], call.atoms.dead("size 1"), *call.x[at:]]


def squeeze(call: Call) -> Labels:
    gone = call.dims()
    return [array for d, array in enumerate(call.x) if not (d in gone and len(array) == 1)]


def expand(call: Call) -> Labels:
    """expand, repeat, tile: a size of 1 is copied, a longer one tiled."""
    missing, found = len(call.shape) - len(call.x), []
    for d, size in enumerate(call.shape):
        array = call.x[d - missing] if d >= missing else call.atoms.dead("size 1")
        if len(array) == size:
            found.append(array)
        elif len(array) == 1:
            found.append(call.atoms.fresh(size))
        else:
            found.append(merged(call.atoms, [call.atoms.dead("copies", size // len(array)), array]))
    return found


def repeated(call: Call) -> Labels:
    """repeat_interleave by a number, along a dimension."""
    times = call.given.get("repeats")
    if not isinstance(times, int) or call.given.get("dim") is None:
        raise NoRuleError(call.name)
    at, found = call.dim(), list(call.x)
    copies = call.atoms.fresh(times)
    found[at] = copies if len(found[at]) == 1 else merged(call.atoms, [found[at], copies])
    return found


def joined(call: Call) -> Labels:
    """cat."""
    labels = [label for label in tensors(call.given["tensors"]) if label != [] and len(label[0])]
    at = call.dim(of=len(call.shape)) if call.given.get("dim") is not None else 0
    return [
        np.concatenate([label[d] for label in labels]) if d == at
        else elementwise(call.atoms, [[label[d]] for label in labels], [size])[0]
        for d, size in enumerate(call.shape)
    ]  # fmt: skip


def stack(call: Call) -> Labels:
    at = call.dim(of=len(call.shape)) if call.given.get("dim") is not None else 0
    rest = [size for d, size in enumerate(call.shape) if d != at]
    inside = elementwise(call.atoms, tensors(call.given["tensors"]), rest)
    return [*inside[:at], call.atoms.dead("stacked", call.shape[at]), *inside[at:]]


def split(call: Call) -> Labels:
    """split, chunk: into parts one after the other. The parts of one size stay of one size, because the code
    that asks for them names a number of parts or one size for all."""
    at, start, found = call.dim(), 0, []
    for shape in call.shape:
        part = call.x[at][start : start + shape[at]]
        found.append([*call.x[:at], part, *call.x[at + 1 :]])
        start += shape[at]
    names = ("split_size", "split_sizes", "chunks", "sections")
    sizes = next((call.given[name] for name in names if name in call.given), None)
    if isinstance(sizes, list) and len(set(sizes)) == 1:
        sizes = sizes[0]  # the code may name one size for all: split((c, c), 1)
    if isinstance(sizes, int):
        for label in found[1:]:
            if len(label[at]) == len(found[0][at]):
                call.atoms.tie(found[0][at], label[at])
            else:  # the last part is shorter
                call.atoms.freeze_all([[found[0][at], label[at]]], "parts of different sizes")
    return found


def unbind(call: Call) -> Labels:
    at = call.dim()
    call.atoms.freeze(call.x[at], "its indices are named one by one")
    return [call.x[:at] + call.x[at + 1 :] for _ in call.shape]


def select(call: Call) -> Labels:
    at = call.dim()
    call.atoms.freeze(call.x[at], "its indices are named one by one")
    return call.x[:at] + call.x[at + 1 :]


def sliced(call: Call) -> Labels:
    at, found = call.dim(), list(call.x)
    start, step = call.given.get("start"), call.given.get("step") or 1
    end = call.given.get("end")
    if "length" in call.given:
        end = int(start or 0) + int(call.given["length"])
    if not all(isinstance(k, int) or k is None for k in (start, end, step)):
        raise NoRuleError(call.name)
    found[at] = call.x[at][slice(start, end, step)]
    if step != 1:
        call.atoms.freeze(call.x[at], "slice with steps")
    return found


def index(call: Call) -> Labels:
    given = call.given["indices"]
    places = [d for d, item in enumerate(given) if item is not None]
    for d in places:
        call.atoms.freeze(call.x[d], "rows are looked up")
    sizes = np.broadcast_shapes(*[tuple(len(array) for array in given[d]) for d in places])
    made = [call.atoms.dead("looked up", n) for n in sizes]
    rest = [array for d, array in enumerate(call.x) if d not in places]
    if places == list(range(places[0], places[-1] + 1)):
        return [*call.x[: places[0]], *made, *call.x[places[-1] + 1 :]]
    return [*made, *rest]


def index_select(call: Call) -> Labels:
    at, found = call.dim(), list(call.x)
    call.atoms.freeze(call.x[at], "rows are looked up")
    found[at] = call.atoms.dead("looked up", call.shape[at])
    return found


def padded(call: Call) -> Labels:
    found, pad = list(call.x), call.given["pad"]
    for k in range(len(pad) // 2):
        if pad[2 * k] or pad[2 * k + 1]:
            at = len(found) - 1 - k
            call.atoms.freeze(found[at], "padded")
            found[at] = call.atoms.dead("padded", call.shape[at])
    return found


def pixel_shuffle(call: Call) -> Labels:
    r = int(call.given["upscale_factor"])
    wide, square = parted(call.atoms, call.x[1], [len(call.x[1]) // (r * r), r * r])
    call.atoms.freeze(square, "pixel_shuffle")
    return [call.x[0], wide, *call.other(call.shape[2:])]


def pixel_unshuffle(call: Call) -> Labels:
    r = int(call.given["downscale_factor"])
    return [call.x[0], np.repeat(call.x[1], r * r), *call.other(call.shape[2:])]


def channel_shuffle(call: Call) -> Labels:
    """View as groups of places, swap the two, and flatten them again."""
    groups = int(call.given["groups"])
    group, place = parted(call.atoms, call.x[1], [groups, len(call.x[1]) // groups])
    call.groups = group
    return [call.x[0], merged(call.atoms, [place, group]), *call.x[2:]]


def made(call: Call) -> Labels:
    """zeros, ones, full: constants whose sizes are literals, free to shrink."""
    return [call.atoms.fresh(size) for size in call.shape]


def counted(call: Call) -> Labels:
    """arange and kin: each index has its own value."""
    if isinstance(call.shape, list):
        return [[call.atoms.dead("counted", size) for size in shape] for shape in call.shape]
    return [call.atoms.dead("counted", size) for size in call.shape]


def cornered(call: Call) -> Labels:
    """tril, triu: which elements stay depends on the place."""
    call.atoms.freeze_all([call.x], call.name)
    return list(call.x)


def unfolded(call: Call) -> Labels:
    """unfold of a tensor's own dimension into windows."""
    at = call.dim("dimension")
    call.atoms.freeze(call.x[at], call.name)
    found = [*call.x, call.atoms.dead("space", call.shape[-1])]
    found[at] = call.atoms.dead("space", call.shape[at])
    return found
