"""Grid: a node of an edge, with digest, bytes and JSON like a form, but not a weight."""

import json

import pytest
import torch

from tersor.errors import FormatError
from tersor.forms import FORMS, NODES, Dense, Form, Grid, Node, Sum
from tersor.record.node_json import flatten, unflatten

GRID = Grid(Dense(torch.tensor([0.5, 0.25])), Dense(torch.tensor([3, 4])), bits=4, signed=True, stale=True)


def test_a_grid_is_a_node_and_not_a_form() -> None:
    assert isinstance(GRID, Node)
    assert not isinstance(GRID, Form)
    assert not any(hasattr(GRID, word) for word in ("decode", "take", "shape", "slices"))
    assert set(NODES.values()) - set(FORMS.values()) == {Grid}


def test_it_is_flattened_and_back() -> None:
    tree, arrays = flatten(GRID, "net/add:0")
    assert set(arrays) == {"net/add:0:scale", "net/add:0:zero"}
    back = unflatten(json.loads(json.dumps(tree)), "net/add:0", arrays.__getitem__, NODES)
    assert isinstance(back, Grid)
    assert back.digest == GRID.digest
    assert back.stale
    assert GRID.nbytes == 2 * 4 + 2 * 8
    assert [path for path, _ in GRID.walk()] == ["", "scale", "zero"]


def test_golden_digest_of_a_grid() -> None:
    assert GRID.digest == "ca397e8db364d865"
    others = (
        GRID.replace(stale=False),
        GRID.replace(zero=None),
        GRID.replace(scale=GRID.zero),
        GRID.replace(axis=0),
    )
    assert len({GRID.digest, *(other.digest for other in others)}) == 5


def test_the_tree_of_a_weight_holds_forms_only() -> None:
    tree, arrays = flatten(Sum(GRID, GRID), "w")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"w:a: form 'grid' is not known; known are affine"):
        unflatten(tree, "w", arrays.__getitem__, FORMS)
