"""Channel cuts: on each toy, the cut graph equals the masked one, and the module itself with zeros.

These are the proofs of the labels. The expected families are stated with each toy, so that rules that freeze
too much fail here as well.
"""

import pytest
from channel_toys import COUNTED, TOYS, apart, eager, known, some_units, tensors_of, zeroed
from torch.utils._pytree import tree_leaves

from tersor.model.channels.run_graph import GraphRun

SEEDS = range(3)


@pytest.mark.parametrize("name", TOYS)
def test_families_are_as_stated(name: str) -> None:
    _, _, exact, every = known(name)
    toy = TOYS[name]
    assert {family.name: family.size for family in exact.families} == toy.exact
    assert {family.name: family.size for family in every.families} == toy.every
    assert not any(family.flags for family in exact.families)
    assert any(family.flags for family in every.families) == (toy.exact != toy.every)
    for (tensor, axis), reason in toy.frozen.items():
        label = exact.walk.tensors[tensor][axis]
        reasons = exact.why_frozen(tensor, axis)
        assert any(reason in text for text in reasons), reasons
        assert sum(reasons.values()) == len(label)


@pytest.mark.parametrize("name", TOYS)
def test_the_whole_graph_equals_the_module(name: str) -> None:
    model, inputs, groups, _ = known(name)
    run = GraphRun(groups, groups.removed([]), cut=True, wide=True)
    found = run.outputs(tensors_of(model), tree_leaves(inputs))
    assert apart(found, eager(model, inputs)) < TOYS[name].eager


@pytest.mark.parametrize(("name", "mode"), [*((n, "exact") for n in TOYS), *((n, "every") for n in COUNTED)])
def test_cut_equals_masked(name: str, mode: str) -> None:
    model, inputs, *both = known(name)
    groups = both[mode == "every"]
    tensors, leaves, whole = tensors_of(model), tree_leaves(inputs), eager(model, inputs)
    for seed in SEEDS:
        gone = some_units(groups, seed)
        assert gone.any()
        cut = GraphRun(groups, gone, cut=True, wide=True).outputs(tensors, leaves)
        masked = GraphRun(groups, gone, cut=False, wide=True).outputs(tensors, leaves)
        assert apart(cut, masked) < 1e-9
        assert apart(cut, whole) > 1e-3, "nothing that was cut counts"
        if mode == "exact":
            assert apart(masked, eager(zeroed(model, groups, gone), inputs)) < TOYS[name].eager


@pytest.mark.parametrize("name", COUNTED)
def test_what_a_normalizer_counts_is_not_equal_to_a_zero(name: str) -> None:
    """Else it need not be flagged. Every family with flags, alone."""
    model, inputs, _, groups = known(name)
    for family in groups.families:
        if family.flags:
            gone = groups.removed([family.units[: family.size // 2]])
            cut = GraphRun(groups, gone, cut=True, wide=True).outputs(tensors_of(model), tree_leaves(inputs))
            assert apart(cut, eager(zeroed(model, groups, gone), inputs)) > 1e-4


@pytest.mark.parametrize("name", TOYS)
def test_each_unit_has_slices_of_its_own(name: str) -> None:
    """Slices of different units never overlap, each unit has as many as any other of its family, and what is
    removed is exactly these slices."""
    groups = known(name)[3]
    seen: set[tuple[str, int, int]] = set()
    for family in groups.families:
        for at, unit in enumerate(family.units):
            own = {(s.tensor, s.axis, int(k)) for s in family.slices for k in s.at[at]}
            assert len(own) == sum(s.at.shape[1] for s in family.slices)
            assert not own & seen
            seen |= own
            cuts = groups.cuts(groups.removed([unit]))
            lost = {
                (tensor, axis, k) for (tensor, axis), kept in cuts.items()
                for k in set(range(len(groups.walk.tensors[tensor][axis]))) - set(kept.tolist())
            }  # fmt: skip
            assert lost == own
