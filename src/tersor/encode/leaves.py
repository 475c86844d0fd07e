"""Leaves: plain leaves of a form as streams, without loss, and a tree's leaves coded as those of another.

bits ~ N * H(leaf)        or fewer, where a coder sees rows and columns; the mask above says what counts
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tersor.dtypes import CODED
from tersor.forms import PROFILES, At, Coded, Dense, Form
from tersor.forms.coded import columns

WORTH = 32  # bytes: what naming a coder costs in the file, about
MANY_FLOATS = 1 << 16  # elements: above, floats are coded fast


def coded(leaf: Dense | Tensor, keep: Tensor | None = None, coder: str = "max") -> Coded:
    """The leaf as a stream; with `keep` (bool, its shape) only what is kept is in it.

    `coder` is a profile, which it keeps, or another coder of tersor.coders. A mask is tried both ways: an
    element a symbol, or 8. Many floats are coded by the static coders: contexts save 0.3 % of them, and
    take a hundred times as long.
    """
    from tersor.coders import encode
    from tersor.coders.arrays import encode_array

    leaf = leaf if isinstance(leaf, Dense) else Dense(leaf)
    size, dtype, profile = leaf.shape, leaf.dtype, coder if coder in PROFILES else "max"
    elements = leaf if keep is None else Dense(leaf.array[keep])
    count, turned = math.prod(elements.shape), dtype.is_floating_point
    if turned and coder == "max" and count > MANY_FLOATS:
        coder = "fast"
    mask = None if keep is None else keep.reshape(-1).cpu().numpy()
    read = elements.reader()
    data, lengths = encode_array(
        read, count, dtype.itemsize, turned=turned, coder=coder, width=columns(size), keep=mask
    )
    pack = False
    if dtype is torch.bool:
        packed = encode(np.packbits(read(0, count)), "fast" if coder == "max" else coder)
        pack = len(packed) < len(data)
        data, lengths = (
            (np.frombuffer(bytearray(packed), np.uint8), [len(packed)]) if pack else (data, lengths)
        )
    word = str(dtype).removeprefix("torch.")
    return Coded(torch.from_numpy(data), size, word, tuple(lengths), pack, keep is not None, turned, profile)


def shortened(at: At, coder: str) -> Coded | None:
    """A plain leaf as a stream, without what the mask above hides; None where that saves nothing."""
    leaf = at.node
    if not isinstance(leaf, Dense) or leaf.dtype not in CODED.values():
        return None
    stream = coded(leaf, at.keep, coder)
    return stream if stream.nbytes + WORTH < leaf.nbytes else None


def recoded(form: Form, like: Form) -> Form:
    """A form with plain leaves, coded as `like` is: a leaf that is coded there by its own profile, one that
    is plain there not, and one that is new here by the profile of the first that is coded there."""
    old = dict(like.walk())
    profiles = [node.coder for node in old.values() if isinstance(node, Coded)]

    def change(at: At) -> Form | None:
        was = old.get(at.path)
        if not profiles or isinstance(was, Dense):
            return None
        return shortened(at, was.coder if isinstance(was, Coded) else profiles[0])

    return At(form).rebuilt(change)
