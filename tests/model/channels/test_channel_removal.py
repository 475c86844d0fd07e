"""Channel removal: what cuts of tensors remove, from the cuts alone, and the model that answers as if cut."""

import copy

import numpy as np
import pytest
import torch
from channel_toys import COUNTED, TOYS, apart, eager, known, some_units, tensors_of, zeroed
from torch.utils._pytree import tree_leaves, tree_map

from tersor.errors import RefusedError
from tersor.model.channels.atoms import DEAD
from tersor.model.channels.counted_run import CountedRun
from tersor.model.channels.groups import removal
from tersor.model.channels.run_graph import GraphRun


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", TOYS)
def test_it_inverts_cuts(name):
    groups = known(name)[3]
    for seed in range(5):
        cuts = groups.cuts(some_units(groups, seed))
        found, gone = removal(groups.walk, cuts)
        assert same(found.cuts(gone), cuts)
        assert not gone[found.solution.component[:DEAD]].any()


@pytest.mark.parametrize("name", TOYS)
def test_a_slice_that_is_left_out_is_cut_as_well(name):
    groups = known(name)[3]
    cuts = groups.cuts(some_units(groups, 0))
    assert len(cuts) > 1
    for left in cuts:
        found, gone = removal(groups.walk, {key: kept for key, kept in cuts.items() if key != left})
        assert same(found.cuts(gone), cuts)


@pytest.mark.parametrize("name", TOYS)
def test_an_index_that_is_kept_in_one_tensor_only(name):
    """The cut of the others removes it there too."""
    groups = known(name)[3]
    cuts = groups.cuts(some_units(groups, 1))
    for (tensor, axis), kept in cuts.items():
        lost = np.setdiff1d(np.arange(len(groups.walk.tensors[tensor][axis])), kept)
        found, gone = removal(groups.walk, {**cuts, (tensor, axis): np.union1d(kept, lost[:1])})
        assert same(found.cuts(gone), cuts)


def ran(model, inputs):
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def double(item):
    return item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item


@pytest.mark.parametrize("name", ["flattened", "group_norm", "lstm", "named", *COUNTED[::2]])
def test_a_counted_run_equals_the_cut(name):
    """The whole output, for a larger batch too; where no normalizer counts, the module with zeros."""
    model, inputs, exact, every = known(name)
    for groups in (exact, every):
        gone = some_units(groups, 3)
        counted = CountedRun(copy.deepcopy(model).double(), groups.cuts(gone)).eval()
        found = ran(counted, tree_map(double, inputs))
        cut = GraphRun(groups, gone, cut=True, wide=True).outputs(tensors_of(model), tree_leaves(inputs))
        assert type(found) is type(ran(model, inputs))
        assert apart(tree_leaves(found), cut) < 1e-9
        twice = tree_map(lambda x: torch.cat([x, x.flip(0), x]) if name != "gru" else x, inputs)
        found = ran(counted, tree_map(double, twice))
        if groups is exact:
            assert apart(tree_leaves(found), eager(zeroed(model, groups, gone), twice)) < 1e-9
        assert apart([x[: len(y)] for x, y in zip(tree_leaves(found), cut, strict=True)], cut) < 1e-9
        assert len(counted.walks) == 2


def test_a_counted_run_in_training_is_the_model():
    model, inputs, _, groups = known("convnext")
    counted = CountedRun(copy.deepcopy(model), groups.cuts(some_units(groups, 0))).train()
    assert apart([ran(counted, inputs)], [ran(model, inputs)]) == 0
    assert apart([ran(counted.eval(), inputs)], [ran(model, inputs)]) > 1e-3


def test_arguments_by_name_and_by_place():
    model, inputs, groups, _ = known("named")
    gone = some_units(groups, 0)
    counted = CountedRun(copy.deepcopy(model), groups.cuts(gone)).eval()
    wanted = ran(counted, inputs)["out"]
    with torch.no_grad():
        for args in ((inputs["left"], inputs["right"], inputs["more"]), (inputs["left"], inputs["right"])):
            rest = {} if len(args) == 3 else {"more": inputs["more"], "scale": 1.0}
            assert apart([counted(*args, **rest)["out"]], [wanted]) < 1e-6
    assert apart([wanted], [x.float() for x in eager(zeroed(model, groups, gone), inputs)]) < 1e-5


@pytest.mark.parametrize("name", ["flattened", "stock_attention", "convnext"])
def test_an_incomplete_cut_is_refused(name):
    model, inputs, _, groups = known(name)
    cuts = groups.cuts(some_units(groups, 0))
    counted = CountedRun(model, cuts).eval()
    for left in cuts:
        lost = np.setdiff1d(np.arange(len(groups.walk.tensors[left[0]][left[1]])), cuts[left])
        some = {key: kept for key, kept in cuts.items() if key != left}
        for kept in (some, {**cuts, left: np.union1d(cuts[left], lost[:1])}):
            counted.kept = kept
            with pytest.raises(RefusedError, match="leaves out slices that belong to its units"):
                ran(counted, inputs)
    counted.kept = cuts
    ran(counted, inputs)
