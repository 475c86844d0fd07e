"""Forms: how a weight is stored. One form per file; this file holds the tables of them.

FORMS    the forms of weights, by name; a tree of these decodes to a tensor
NODES    the forms, and the grid of an edge
"""

from collections import ChainMap
from collections.abc import Mapping
from typing import cast

from tersor.forms.affine import Affine
from tersor.forms.at import At
from tersor.forms.codebook import Codebook
from tersor.forms.coded import PROFILES, Coded, uncoded
from tersor.forms.dense import Dense
from tersor.forms.form import Form
from tersor.forms.grid import Grid
from tersor.forms.loggrid import LogGrid
from tersor.forms.lowrank import LowRank
from tersor.forms.masked import Masked
from tersor.forms.node import Node
from tersor.forms.ongrid import even
from tersor.forms.sum import Sum

FORMS: dict[str, type[Form]] = {
    form.name: form for form in (Dense, Coded, Masked, Affine, Codebook, LogGrid, LowRank, Sum)
}
NODES: Mapping[str, type[Node]] = ChainMap(cast(dict[str, type[Node]], FORMS), {Grid.name: Grid})

__all__ = [
    "FORMS", "NODES", "PROFILES", "Affine", "At", "Codebook", "Coded", "Dense", "Form", "Grid", "LogGrid",
    "LowRank", "Masked", "Node", "Sum", "even", "uncoded",
]  # fmt: skip
