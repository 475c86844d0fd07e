"""Tensor factors: against bounds of singular values, other least-squares solutions, and exact products."""

import pytest
import torch
from torch import Tensor

from tersor.errors import SettingError
from tersor.maths.tensor_factors import Cp, as_columns, channels, cp_factors, train_core, tucker_factors

OUTS, INS, SIZE = 12, 8, 9


def kernel(seed: int = 0) -> Tensor:
    """A kernel whose singular values fall, as those of trained ones do."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(OUTS, OUTS, generator=rng, dtype=torch.float64) * torch.logspace(0, -2, OUTS).double()
    return torch.einsum("op,pik->oik", mix, torch.randn(OUTS, INS, SIZE, generator=rng, dtype=torch.float64))


def moment(seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(400, INS * SIZE, generator=rng, dtype=torch.float64)
    x = (
        x
        @ torch.randn(INS * SIZE, INS * SIZE, generator=rng, dtype=torch.float64)
        * torch.logspace(0, -1, INS * SIZE).double()
    )
    return x.T @ x / len(x)


def whole(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("or,rsk,si->oik", left, core, right)


def cp_whole(cp: Cp) -> Tensor:
    return torch.einsum("or,ri,rk->oik", *cp)


def squares(gap: Tensor, gram: Tensor | None = None) -> float:
    rows = gap.flatten(1)
    return float((rows * (rows if gram is None else rows @ gram)).sum())


def test_full_ranks_are_exact() -> None:
    w = kernel()
    for gram in (None, moment()):
        torch.testing.assert_close(whole(*tucker_factors(w, OUTS, INS, gram)), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("outs", "ins"), [(3, 2), (6, 4), (11, 7), (12, 3), (4, 8)])
def test_tucker_is_within_the_bounds_of_its_singular_values(outs: int, ins: int) -> None:
    """De Lathauwer 2000: between the larger of the two modes' lost energies and their sum."""
    w = kernel()
    left, core, right = tucker_factors(w, outs, ins)
    assert (left.shape, core.shape, right.shape) == ((OUTS, outs), (outs, ins, SIZE), (ins, INS))
    lost = [
        float((torch.linalg.svdvals(rows.flatten(1))[rank:] ** 2).sum())
        for rows, rank in ((w, outs), (w.transpose(0, 1), ins))
    ]
    assert max(lost) * (1 - 1e-9) <= squares(w - whole(left, core, right)) <= sum(lost) * (1 + 1e-9)


@pytest.mark.parametrize(("outs", "ins"), [(3, 2), (6, 4), (11, 7)])
def test_with_a_moment_no_other_left_and_core_lose_less(outs: int, ins: int) -> None:
    """For its input factor: the least error of rank `outs` in the outputs, by another way to compute it."""
    w, gram = kernel(), moment()
    left, core, right = tucker_factors(w, outs, ins, gram)
    found = squares(w - whole(left, core, right), gram)
    assert found < squares(w - whole(*tucker_factors(w, outs, ins)), gram)
    root = torch.linalg.cholesky(gram)
    wide = torch.kron(right, torch.eye(SIZE, dtype=torch.float64)) @ root  # [S K, I K]
    target = w.flatten(1) @ root
    best = target @ torch.linalg.pinv(wide) @ wide  # the projection on what the inputs allow
    values = torch.linalg.svdvals(best)
    least = float((target - best).square().sum() + (values[outs:] ** 2).sum())
    assert found == pytest.approx(least, rel=1e-5)


def test_inputs_without_data_do_not_matter() -> None:
    """Rank-deficient moments: only channels 0 to 3 are ever seen, and four inputs hold all of them."""
    w, gram = kernel(), moment()
    seen = torch.arange(INS).repeat_interleave(SIZE) < 4
    gram = gram * seen[:, None] * seen
    assert squares(w - whole(*tucker_factors(w, OUTS, 4, gram)), gram) < 1e-6 * squares(w, gram)


def test_the_moment_of_channels_sums_over_positions() -> None:
    gram = moment()
    found = channels(gram, INS, SIZE)
    for a in range(INS):
        for b in range(INS):
            assert found[a, b] == pytest.approx(
                float(sum(gram[a * SIZE + k, b * SIZE + k] for k in range(SIZE)))
            )


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_cp_finds_an_exact_product(rank: int) -> None:
    rng = torch.Generator().manual_seed(rank)
    w = cp_whole(Cp(
        torch.randn(OUTS, rank, generator=rng).double(), torch.randn(rank, INS, generator=rng).double(),
        torch.randn(rank, SIZE, generator=rng).double(),
    ))  # fmt: skip
    assert squares(w - cp_whole(cp_factors(w, rank))) < 1e-4 * squares(w)


def test_cp_loses_less_with_rank_and_no_least_squares_step_gains() -> None:
    w, last = kernel(), float("inf")
    for rank in (1, 2, 4, 8, 16, 40):
        cp = cp_factors(w, rank)
        lost = squares(w - cp_whole(cp))
        assert lost <= last * (1 + 1e-6)
        last = lost
        mixed = torch.einsum("ri,rk->rik", cp.right, cp.kernel).flatten(1)
        best = torch.linalg.lstsq(mixed.T, w.flatten(1).T).solution.T
        assert lost <= squares(w - (best @ mixed).reshape(w.shape)) + 0.02 * squares(w)
        norms = [float(factor.norm()) for factor in (cp.left, cp.right, cp.kernel)]
        assert max(norms) <= min(norms) * 1.01
    assert last < 1e-2 * squares(w)


def test_it_repeats_and_takes_zeros() -> None:
    w = kernel().float()
    assert all(map(torch.equal, cp_factors(w, 5), cp_factors(w, 5)))
    nothing = torch.zeros(4, 3, 9)
    assert not cp_whole(cp_factors(nothing, 2)).any()
    assert not whole(*tucker_factors(nothing, 2, 2)).any()
    assert not whole(*tucker_factors(nothing, 2, 2, torch.zeros(27, 27))).any()


@pytest.mark.parametrize(
    ("shape", "ranks"), [((4, 3), (1, 1)), ((4, 3, 9), (5, 1)), ((4, 3, 9), (1, 4)), ((4, 3, 9), (0, 1))]
)
def test_wrong_shapes_and_ranks_are_named(shape: tuple[int, ...], ranks: tuple[int, int]) -> None:
    with pytest.raises(SettingError, match="factors: "):
        tucker_factors(torch.zeros(shape), *ranks)


def test_a_moment_of_other_inputs_is_named() -> None:
    with pytest.raises(SettingError, match="gram: it has shape"):
        tucker_factors(torch.zeros(4, 3, 9), 1, 1, torch.zeros(3, 3))


def train(outs: int, ins: int, middle: int) -> tuple[Tensor, Tensor]:
    """(the kernel [O, I, H, W], its nearest train of these ranks that is found)"""
    w = kernel().unflatten(2, (3, 3))
    left, core, right = tucker_factors(w.flatten(2), outs, ins)
    left, core = train_core(left, core.unflatten(2, (3, 3)), middle)
    assert torch.linalg.matrix_rank(as_columns(core)) <= middle
    torch.testing.assert_close(left.T @ left, torch.eye(outs, dtype=left.dtype))
    return w, torch.einsum("or,rshw,si->oihw", left, core, right)


@pytest.mark.parametrize("ranks", [(3, 2, 2), (6, 4, 9), (11, 7, 8), (12, 3, 5), (4, 8, 12)])
def test_a_train_is_within_the_bounds_of_its_singular_values(ranks: tuple[int, int, int]) -> None:
    """Oseledets 2011: between the largest of the three unfoldings' lost energies and their sum."""
    w, found = train(*ranks)
    unfolded = (w.flatten(1), w.transpose(0, 1).flatten(1), as_columns(w))
    lost = [float((torch.linalg.svdvals(a)[r:] ** 2).sum()) for a, r in zip(unfolded, ranks, strict=True)]
    assert max(lost) * (1 - 1e-9) <= squares(w - found) <= sum(lost) * (1 + 1e-9)


def test_columns_and_rows_are_those_of_the_kernel() -> None:
    w = torch.randn(3, 4, 2, 5)
    rows = as_columns(w)
    for o, i, h, wide in torch.cartesian_prod(*map(torch.arange, w.shape)).tolist():
        assert rows[o * 5 + wide, i * 2 + h] == w[o, i, h, wide]


def test_a_train_is_found_again() -> None:
    rng = torch.Generator().manual_seed(4)
    a, b, c, d = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in ((2, 7), (2, 3, 3), (3, 3, 4), (9, 4))
    )
    w = torch.einsum("si,shm,mwr,or->oihw", a, b, c, d)
    left, core, right = tucker_factors(w.flatten(2), 4, 2)
    left, core = train_core(left, core.unflatten(2, (3, 3)), 3)
    torch.testing.assert_close(torch.einsum("or,rshw,si->oihw", left, core, right), w)
