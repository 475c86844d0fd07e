"""How one weight is stored: a small tree that decodes to a tensor. One form a file; this is the one table
of them."""

from tersor.forms.affine import Affine
from tersor.forms.codebook import Codebook
from tersor.forms.coded import Coded, coded, uncoded
from tersor.forms.dense import Dense
from tersor.forms.form import Form
from tersor.forms.loggrid import LogGrid
from tersor.forms.lowrank import LowRank
from tersor.forms.masked import Masked
from tersor.forms.refine import refine
from tersor.forms.sum import Sum

FORMS: dict[str, type[Form]] = {
    form.name: form for form in (Dense, Coded, Masked, Affine, Codebook, LogGrid, LowRank, Sum)
}

Node, NODES = Form, FORMS


class Grid(Form):
    name = "grid"


def recoded(form, like):
    return form


__all__ = [
    "FORMS", "NODES", "Grid", "Node", "recoded", "Affine", "Codebook", "Coded", "Dense", "Form", "LogGrid", "LowRank", "Masked", "Sum",
    "coded", "refine", "uncoded",
]  # fmt: skip
