"""Channel costs: multiply-accumulates and elements, against torch's counter and the sizes of what is cut."""

import pytest
import torch
from channel_toys import TOYS, known, prepared, some_units, tensors_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tersor.maths.allocation import Cost
from tersor.model.channels import costs
from tersor.model.channels.groups import groups_of, walked
from tersor.model.channels.run_graph import GraphRun

RECURRENT = ("lstm", "gru", "projected_lstm")  # torch does not count these


def counts_of(groups, gone):
    return [int((~gone[family.units]).sum()) for family in groups.families]


def counted(run):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops() / 2


@pytest.mark.sampled(name=tuple(name for name in TOYS if name not in RECURRENT)[::6])
@pytest.mark.parametrize("name", [name for name in TOYS if name not in RECURRENT])
def test_macs_are_those_of_the_cut_graph(name):
    model, inputs, _, groups = known(name)
    cost = costs.macs(groups, groups.families)
    for seed in range(3):
        gone = some_units(groups, seed) if seed else groups.removed([])
        run = GraphRun(groups, gone, cut=True)
        wanted = counted(lambda run=run: run.outputs(tensors_of(model), tree_leaves(inputs)))
        assert cost.total(counts_of(groups, gone)) == wanted > 0


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("layers", [1, 2])
def test_macs_of_recurrent_layers(kind, gates, layers):
    """Both products of each gate, at each step."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = kind(6, 8, layers, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.cell(x)[0])

    model = prepared(Net())
    groups = groups_of(walked(model, (torch.zeros(2, 5, 6),), set(model.state_dict())))
    assert [family.size for family in groups.families] == [8]
    for h in (8, 5, 2):
        each = gates * h * (6 + h) + (layers - 1) * gates * h * 2 * h
        assert costs.macs(groups, groups.families).total([h]) == 2 * 5 * (each + 3 * h)


@pytest.mark.parametrize("name", TOYS)
def test_parameters_are_the_elements_that_stay(name):
    model, _, _, groups = known(name)
    stored = {name: x for name, x in tensors_of(model).items() if name in model.state_dict()}
    learned = dict(model.named_parameters())
    cost = costs.parameters(groups, groups.families)
    each = {name: float(k % 3) for k, name in enumerate(stored) if k != 1}  # one is not counted
    weighted = costs.parameters(groups, groups.families, each)
    for seed in range(3):
        gone = some_units(groups, seed)
        left = dict.fromkeys(stored, 1)
        cuts = groups.cuts(gone)
        for tensor, x in stored.items():
            for axis, size in enumerate(x.shape):
                left[tensor] *= len(cuts[tensor, axis]) if (tensor, axis) in cuts else size
        counts = counts_of(groups, gone)
        assert cost.total(counts) == sum(left[name] for name in learned)
        assert cost.total(counts) < sum(x.numel() for x in learned.values())
        assert weighted.total(counts) == sum(each[n] * left[n] for n in each)


def test_a_change_of_one_family_is_priced_as_the_total():
    """What allocation asks: attention, where a family is on both sides of a product."""
    groups = known("encoder_layer")[3]
    cost = costs.macs(groups, groups.families)
    whole = [family.size for family in groups.families]
    for k, size in enumerate(whole):
        import numpy as np

        tried = np.arange(1, size + 1, dtype=float)
        along = cost.along(whole, k, tried)
        totals = [cost.total([*whole[:k], int(n), *whole[k + 1 :]]) for n in tried]
        assert along - along[0] == pytest.approx(np.array(totals) - totals[0])


def test_some_families_only():
    """The others count as they are."""
    groups = known("dense_cat")[2]
    some = groups.families[1:3]
    sizes = [family.size for family in groups.families]
    assert costs.macs(groups, some).total([2, 3]) == costs.macs(groups, groups.families).total(
        [sizes[0], 2, 3, sizes[3]]
    )
    assert costs.units(some).total([2, 3]) == 5
    assert isinstance(costs.units(some), Cost)


def test_units_are_counted_alike():
    groups = known("flattened")[2]
    assert costs.units(groups.families).total([4, 9]) == 13
