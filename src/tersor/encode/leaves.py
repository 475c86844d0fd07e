"""Leaves: code the plain leaves of a form as lossless streams, or with the profiles of another form.

bits ~ N * H(leaf)        or fewer, with a matrix coder; elements hidden by the mask above are left out
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tersor.dtypes import CODED
from tersor.forms import PROFILES, At, Coded, Dense, Form
from tersor.forms.coded import columns

WORTH = 32  # bytes that a stream must save: the approximate cost of its description in the file
MANY_FLOATS = 1 << 16  # elements: larger arrays of floats use the profile "fast",
MANY_WIDE = 1 << 9  # and those of 4 bytes or more from here on: contexts see little besides their mantissas


def coded(leaf: Dense | Tensor, keep: Tensor | None = None, coder: str = "max") -> Coded:
    """Code a leaf as a stream. With a mask `keep` (bool, the leaf's shape), only kept elements are stored.

    `coder` is a profile, which the result stores, or a coder of tersor.coders. For a bool leaf, both 1 and 8
    elements in a symbol are tried. Many floats use static coders: contexts would save 0.3 % and take a
    hundred times as long.
    """
    from tersor.coders import encode
    from tersor.coders.arrays import encode_array

    leaf = leaf if isinstance(leaf, Dense) else Dense(leaf)
    size, dtype, profile = leaf.shape, leaf.dtype, coder if coder in PROFILES else "max"
    elements = leaf if keep is None else Dense(leaf.array[keep])
    count, turned = math.prod(elements.shape), dtype.is_floating_point
    if turned and coder == "max" and count > (MANY_FLOATS if dtype.itemsize < 4 else MANY_WIDE):
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


def coded_if_shorter(at: At, coder: str) -> Coded | None:
    """A plain leaf as a stream, without the elements hidden by the mask above. None if that saves nothing."""
    leaf = at.node
    if not isinstance(leaf, Dense) or leaf.dtype not in CODED.values():
        return None
    stream = coded(leaf, at.keep, coder)
    return stream if stream.nbytes + WORTH < leaf.nbytes else None


def coded_like(form: Form, like: Form) -> Form:
    """Code the plain leaves of `form` as those of `like` are coded.

    A leaf that is coded in `like` uses the same profile. A leaf that is plain in `like` stays plain. A leaf
    that `like` does not have uses the profile of the first coded leaf of `like`.
    """
    old = dict(like.walk())
    profiles = [node.coder for node in old.values() if isinstance(node, Coded)]

    def change(at: At) -> Form | None:
        was = old.get(at.path)
        if not profiles or isinstance(was, Dense):
            return None
        return coded_if_shorter(at, was.coder if isinstance(was, Coded) else profiles[0])

    return At(form).rebuilt(change)
