"""Take: a cut form decodes to the cut weights bit for bit, keeps its structure and shrinks in proportion."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_forms import close, forms
from torch import Tensor

from tersor.encode import coded
from tersor.forms import (
    FORMS,
    Affine,
    At,
    Codebook,
    Dense,
    Form,
    LogGrid,
    LowRank,
    Masked,
    Sum,
    even,
    uncoded,
)
from tersor.forms.form import as_bytes
from tersor.forms.ongrid import NODE, OnGrid
from tersor.io.validate import structure
from tersor.model.sites import Site

each_form = pytest.mark.parametrize("name", FORMS)


def picks(length: int, numbers: list[int]) -> Iterator[Tensor]:
    """None, all, one, backwards, repeated, every second, any."""
    every = list(range(length))
    some = [[], every, every[-1:], every[::-1], [*every[-1:], *every[:1] * 2], every[1::2]]
    yield from (torch.tensor(pick, dtype=torch.int64) for pick in some)
    yield torch.tensor([n % length for n in numbers] if length else [], dtype=torch.int64)


def cuts(form: Form, numbers: list[int]) -> Iterator[tuple[int, Tensor]]:
    for axis in range(-1 if form.shape else 0, len(form.shape)):
        yield from ((axis, index) for index in picks(form.shape[axis], numbers))


def rank(form: Form) -> int:
    """The largest rank of its products: from 2 on sums have no fixed order, from 1 on zeros no fixed sign."""
    return max((node.left.shape[1] for _, node in form.walk() if isinstance(node, LowRank)), default=0)


@each_form
def test_take_commutes_with_decode(name: str) -> None:
    @given(forms(name), st.lists(st.integers(0, 99), max_size=6))
    def check(form: Form, numbers: list[int]) -> None:
        whole = form.decode()
        for axis, index in cuts(form, numbers):
            want, cut = whole.index_select(axis, index), form.take(axis, index)
            got = cut.decode()
            assert cut.shape == tuple(want.shape) == tuple(got.shape)
            assert got.dtype == want.dtype
            if rank(form) == 0:
                assert bytes(as_bytes(got)) == bytes(as_bytes(want))
            elif rank(form) == 1:
                assert torch.equal(got, want)
            assert close(got, want.numpy(), form)

    check()


def outline(form: Form) -> object:
    """The tree without the values of its leaves and without the grouping of columns."""
    children = {key: outline(child) for key, child in form.children().items() if key != "member"}
    settings = {key: value for key, value in form.settings().items() if key not in ("group", "runs")}
    return form.name, settings, children


@given(forms(), st.lists(st.integers(0, 99), max_size=6))
def test_a_cut_form_keeps_its_structure(form: Form, numbers: list[int]) -> None:
    plain = uncoded(form)
    for axis, index in cuts(plain, numbers):
        cut = plain.take(axis, index)
        assert outline(cut) == outline(plain)
        structure(cut, Site("w", cut.shape, str(cut.decode().dtype).removeprefix("torch."), "linear"))


@given(forms(), st.lists(st.integers(0, 99), max_size=6))
def test_a_cut_form_shrinks_in_proportion(form: Form, numbers: list[int]) -> None:
    """Tables do not grow, or grow in proportion if rows are repeated. Ragged groups take at most a byte per
    column, the size of a list of each column's group."""
    plain = uncoded(form)
    before = [at.node for at in At(plain).down()]
    for axis, index in cuts(plain, numbers):
        more = max(1.0, len(index) / max(plain.shape[axis], 1))
        cut, most = plain.take(axis, index), 0.0
        for node in before:
            most += node.nbytes * more if node.arrays() else 0
            if isinstance(node, OnGrid):
                most += NODE + math.prod(cut.shape)
        assert cut.nbytes <= most


@given(forms(), st.data())
def test_a_smaller_form_is_smaller(form: Form, data: st.DataObject) -> None:
    """The codes of removed weights are removed."""
    plain = uncoded(form)
    for axis, length in enumerate(plain.shape):
        index = torch.tensor(data.draw(st.permutations(range(length)))[: length // 2], dtype=torch.int64)
        cut = {at.path: at for at in At(plain.take(axis, index)).down()}
        for at in At(plain).down():
            if at.node.arrays() and follows(at):
                assert cut[at.path].node.nbytes * length == at.node.nbytes * len(index)


def follows(at: At) -> bool:
    """Whether a node is aligned with the root."""
    return at.path == "" or (at.above is not None and follows(at.above))


CODES = (torch.arange(300 * 300) % 251 - 125).reshape(300, 300).to(torch.int8)


def test_rdoq_layer_costs_half_when_half_of_it_is_left() -> None:
    """The step of a weight is one of its row times one of its column: 90,000 codes and 600 floats."""
    steps = LowRank(Dense(torch.rand(300, 1)), Dense(torch.rand(1, 300)))
    form = Affine(Dense(CODES), steps, group=1)
    assert form.nbytes == 92_400
    half = torch.arange(0, 300, 2)
    assert form.take(0, half).nbytes == form.take(1, half).nbytes == 45_000 + 150 * 4 + 300 * 4
    assert form.take(1, half).take(0, half).nbytes == 22_500 + 300 * 4
    moved = form.take(1, torch.randperm(300, generator=torch.Generator().manual_seed(0)))
    assert isinstance(moved, Affine)
    assert (moved.group, moved.nbytes) == (1, 92_400)


def grid(group: int, zero: bool = False, columns: int = 300) -> Affine:
    groups = -(-columns // group)
    scale = torch.rand(300, groups, generator=torch.Generator().manual_seed(group))
    zeros = Dense((scale * 9).to(torch.int16)) if zero else None
    return Affine(Dense(CODES[:, :columns]), Dense(scale), zeros, group=group)


def test_ragged_groups_are_runs() -> None:
    cut = grid(64).take(1, torch.tensor([*range(10, 100), 299]))
    assert (cut.group, cut.runs, cut.member) == (0, (54, 36, 1), None)
    assert cut.scale.shape == (300, 3)
    assert cut.take(1, torch.arange(60)).runs == ()  # equal groups again: the last one may be shorter
    assert cut.take(1, torch.arange(60)).group == 54
    one = cut.take(1, torch.arange(54))
    assert (one.group, one.runs, one.scale.shape) == (0, (), (300, 1))


def test_a_last_group_that_is_longer_is_a_run() -> None:
    cut = grid(50).take(1, torch.arange(40, 100))
    assert (cut.group, cut.runs) == (0, (10, 50))
    assert torch.equal(cut.decode(), grid(50).decode()[:, 40:100])


def test_cutting_whole_groups_leaves_equal_groups() -> None:
    cut = grid(50).take(1, torch.cat([torch.arange(50, 100), torch.arange(250, 300)]))
    assert (cut.group, cut.runs, cut.scale.shape) == (50, (), (300, 2))


@pytest.mark.parametrize("zero", [False, True])
def test_permuted_inputs_have_members(zero: bool) -> None:
    form = grid(64, zero)
    moved = form.take(1, torch.randperm(300, generator=torch.Generator().manual_seed(0)))
    assert moved.member is not None
    assert moved.nbytes == form.nbytes + 300
    back = moved.take(1, torch.argsort(torch.randperm(300, generator=torch.Generator().manual_seed(0))))
    assert back.digest == form.digest


def test_more_than_256_groups_need_wider_members() -> None:
    form = grid(1, columns=300)
    cut = form.take(1, torch.arange(300).repeat(2))
    assert cut.member is not None
    assert cut.member.decode().dtype is torch.int16
    assert cut.nbytes == 2 * CODES.nbytes + 4 * CODES.numel() + 600 * 2


def test_a_few_permuted_blocks_are_runs() -> None:
    """Two runs of the same group cost 1,200 bytes more for scales; members would cost 300."""
    swapped = torch.cat([torch.arange(150, 300), torch.arange(150)])
    few = Affine(Dense(CODES[:5]), Dense(torch.rand(5, 3)), group=100).take(1, swapped)
    assert (few.runs, few.member) == ((50, 100, 100, 50), None)
    assert grid(100).take(1, swapped).member is not None


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1])
def test_convolutions_count_groups_along_the_row(axis: int, rows: int) -> None:
    codes = torch.arange(4 * 6 * 3 * 3).reshape(4, 6, 3, 3) % 120
    shape = (4, 54) if rows == 0 else (6, 36)
    scale = torch.rand(shape[0], shape[1] // 9)
    form = Affine(Dense(codes.to(torch.int8)), Dense(scale), group=9, axis=rows)
    index = torch.tensor([2, 0])
    cut = form.take(axis, index)
    assert torch.equal(cut.decode(), form.decode().index_select(axis, index))
    if axis == 1 - rows:  # an input: its block of nine and their scale are removed
        assert (cut.group, cut.scale.shape) == (9, (shape[0], 2))


def test_vectors_are_one_row() -> None:
    form = Affine(Dense(CODES[0, :10]), Dense(torch.rand(1, 4)), group=3)
    cut = form.take(0, torch.tensor([0, 4, 5, 9]))
    assert (cut.runs, cut.scale.shape) == ((1, 2, 1), (1, 3))
    assert torch.equal(cut.decode(), form.decode()[[0, 4, 5, 9]])


def test_hidden_elements_are_cut_too() -> None:
    """A grid under a mask stays a grid, with coded or dense leaves."""
    keep = CODES > 20
    for leaf in (Dense(CODES), coded(CODES, keep)):
        form = Masked(coded(keep), Affine(leaf, Dense(torch.rand(300, 5)), group=64))
        cut = form.take(1, torch.arange(100, 200))
        assert isinstance(cut.body, Affine)
        assert cut.body.runs == (28, 64, 8)
        assert torch.equal(cut.decode(), form.decode()[:, 100:200])


def test_tables_that_are_not_cut_are_not_decoded() -> None:
    form = Affine(Dense(CODES), coded(torch.rand(300, 1)))
    assert form.take(1, torch.arange(9)).scale is form.scale
    grouped = Affine(Dense(CODES), coded(torch.ones(300, 3)), group=100)
    assert grouped.take(1, torch.arange(299)).scale is grouped.scale


def test_a_table_for_the_one_row_there_is_follows_repeats() -> None:
    index, twice = Dense(torch.tensor([[1, 0, 1]], dtype=torch.uint8)), torch.tensor([0, 0])
    form = Codebook(index, Dense(torch.tensor([[2.0, 3.0]])), Dense(torch.tensor([[0.5]])))
    assert form.take(0, twice).decode().tolist() == [[1.5, 1.0, 1.5]] * 2


def test_a_table_of_as_many_values_as_rows_is_no_table_of_rows() -> None:
    form = Codebook(Dense(torch.tensor([[0], [1], [1]], dtype=torch.uint8)), Dense(torch.tensor([1.0, 2, 3])))
    assert form.take(0, torch.tensor([2])).decode().tolist() == [[2.0]]


# --- equal groups, for code that knows no others ---


@given(forms(), st.lists(st.integers(0, 99), max_size=6))
def test_even_decodes_the_same(form: Form, numbers: list[int]) -> None:
    for axis, index in [(0, None), *cuts(form, numbers)] if form.shape else [(0, None)]:
        cut = form if index is None else form.take(axis, index)
        made = even(cut)
        assert bytes(as_bytes(made.decode())) == bytes(as_bytes(cut.decode()))
        for _, node in made.walk():
            assert not isinstance(node, OnGrid) or (node.runs == () and node.member is None)


def test_equal_groups_are_as_large_as_boundaries_allow() -> None:
    scale, codes = Dense(torch.rand(2, 3)), Dense(CODES[:2, :12])
    for runs, group, columns in (((4, 2, 6), 2, 6), ((3, 6, 3), 3, 4), ((1, 8, 3), 1, 12), ((4, 4, 4), 4, 3)):
        made = even(Affine(codes, scale, runs=runs))
        assert isinstance(made, Affine)
        assert (made.group, made.scale.shape) == (group, (2, columns))
    alone = even(
        LogGrid(Dense(CODES[:2, :3] % 7), Dense(torch.rand(2, 1)), member=Dense(torch.zeros(3).byte()))
    )
    assert isinstance(alone, LogGrid)
    assert (alone.group, alone.scale.shape) == (0, (2, 1))


def test_even_keeps_equal_groups() -> None:
    form = Sum(grid(64), Masked(Dense(CODES > 0), Dense(CODES.float())))
    assert even(form) is form
