"""Other network: whether the tensors of a file are another network in the class that was compressed.

replaced    layers became others: a class as it was loads their tensors under the same names and computes
            something else, without an error if it does not mind missing and unknown names
cut         tensors have other shapes: the class refuses them
edges       grids on edges are no tensors: the network computes in floats
A file read into its class, load(FILE).model(net), has all of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

from tersor.io.container import TersorFile
from tersor.model.changes import Replace, Set

CONFIG = "config.json"  # of transformers: it says of which layers from_pretrained builds the network
WORDS = {
    "identity": "left out", "zeros": "left out", "bias": "with a bias more",
    "scaled": "with factors for inputs", "attention": "with other heads", "untie": "no longer tied",
}  # fmt: skip
FACTORS = "made of several"  # any other stock: a layer for each factor


def replaced(changes: Iterable[Set | Replace]) -> str:
    """ "layers replaced: 3 left out, 2 with factors for inputs"; "" if none were."""
    counts = Counter(WORDS.get(change.stock, FACTORS) for change in changes if isinstance(change, Replace))
    return f"layers replaced: {', '.join(f'{n} {word}' for word, n in counts.items())}" if counts else ""


def other_network(path: str | os.PathLike[str]) -> str:
    """What the tensors alone do not show of the network in a file; "" if they show all of it."""
    with TersorFile(path) as file:
        found = [replaced(file.changes)]
        found += [f"tensors of other sizes: {len(file.kept)}"] if file.kept else []
        found += [f"edges with grids, which are not written: {len(file.grids)}"] if file.grids else []
    return "; ".join(word for word in found if word)
