"""Sizes of the matrix coders against theory: log2 C(N, k), and the entropy of known distributions."""

from math import erf, lgamma, log

import numpy as np
import pytest
from coder_cases import as_bytes

from tersor.coders import coder_of, encode


def mask_bytes(size: int, ones: int) -> float:
    """log2 C(N, k) / 8."""
    return (lgamma(size + 1) - lgamma(ones + 1) - lgamma(size - ones + 1)) / log(2) / 8


def code_entropy(deviation: float) -> float:
    """Bits of a normal number of this standard deviation, rounded and clipped to int8."""
    edges = np.array([-np.inf, *np.arange(-127.5, 127), np.inf]) / deviation / np.sqrt(2)
    share = np.diff([0.5 * (1 + erf(edge)) for edge in edges])
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


@pytest.mark.sampled
@pytest.mark.parametrize("share", [0.0005, 0.003, 0.01, 0.05, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("width", [0, 300])
def test_random_masks_are_near_log2_of_the_number_of_masks(share: float, width: int) -> None:
    size, ones = 120_000, round(120_000 * share)
    symbols = np.zeros(size, dtype=np.uint8)
    symbols[np.random.default_rng(0).choice(size, ones, replace=False)] = 1
    bound = mask_bytes(size, ones)
    assert len(encode(symbols, "max", width=width)) <= 1.005 * bound + 8
    # Mixing has to learn the density, which the other coders store.
    assert len(encode(symbols, "mixing", width=width)) <= 1.01 * bound + 20


def test_structured_zeros_are_almost_free() -> None:
    rng = np.random.default_rng(0)
    rows = np.ones((400, 500), dtype=np.uint8)
    rows[rng.choice(400, 120, replace=False)] = 0  # 44 bytes for the choice of rows
    assert len(encode(rows.ravel(), "max", width=500)) <= 100
    columns = np.ascontiguousarray(rows.T)
    assert len(encode(columns.ravel(), "max", width=400)) <= 100
    blocks = np.kron(rng.random((25, 32)) < 0.5, np.ones((16, 16))).astype(
        np.uint8
    )  # 100 bytes for the choice
    assert len(encode(blocks.ravel(), "max", width=512)) <= 520
    assert len(encode(np.zeros(200_000, dtype=np.uint8), "max", width=500)) == 2


@pytest.mark.parametrize("axis", [0, 1])
def test_dead_rows_and_columns_in_a_random_mask(axis: int) -> None:
    rng = np.random.default_rng(1)
    live = rng.random((400, 500)) < 0.1
    where = np.sort(rng.choice(live.shape[axis], 100))
    mask = np.insert(live, where, False, axis=axis)
    bound = mask_bytes(live.size, int(live.sum())) + 60
    assert len(encode(mask.ravel().astype(np.uint8), "max", width=mask.shape[1])) <= 1.01 * bound


def test_codes_under_a_mask_cost_no_more_than_alone() -> None:
    rng = np.random.default_rng(0)
    keep = rng.random((300, 400)) < 0.1
    symbols = as_bytes(np.rint(rng.laplace(0, 3, int(keep.sum()))).clip(-16, 15))
    assert len(encode(symbols, "max", width=400, keep=keep)) <= len(encode(symbols))


def test_normal_codes_with_scales_of_rows_and_columns() -> None:
    rng = np.random.default_rng(0)
    scale = np.outer(np.exp2(rng.uniform(0, 3, 600)), np.exp2(rng.normal(0, 0.4, 400))).clip(0.5, 30)
    codes = as_bytes(np.rint(rng.normal(size=scale.shape) * scale).clip(-128, 127)).ravel()
    known = np.exp2(np.arange(-1, 5, 0.05))
    bits = np.interp(np.log2(scale.ravel()), np.log2(known), [code_entropy(s) for s in known]).sum()
    stream = encode(codes, "max", width=400)
    assert coder_of(stream) == "predictive"
    # The decoder does not know the 1000 scales: each costs half the log2 of a row's length, 4 bits.
    assert bits / 8 <= len(stream) <= 1.01 * bits / 8
    assert len(stream) < 0.93 * len(encode(codes))


def test_correlated_columns() -> None:
    """Nearly the theoretical gain, half the log2 of the ratio of determinants."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(16, 64)) * 3
    covariance = factors.T @ factors + 9 * np.eye(64)
    codes = np.rint(rng.normal(size=(3000, 16)) @ factors + 3 * rng.normal(size=(3000, 64))).clip(-128, 127)
    bits = 3000 * 0.5 * float(np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]) / log(2)
    symbols = as_bytes(codes).ravel()
    stream, alone = len(encode(symbols, "max", width=64)), len(encode(symbols))
    assert bits / 8 <= stream
    assert alone - stream >= 0.88 * (alone - bits / 8)


def test_signs_are_predicted_from_earlier_rows() -> None:
    """Sparse codes whose signs have rank 1: a sign costs a bit for each row and column, not each code."""
    rng = np.random.default_rng(0)
    nonzero = rng.random((300, 400)) < 0.05
    signs = np.outer(rng.choice((-1, 1), 300), rng.choice((-1, 1), 400))
    rank1, free = np.where(nonzero, signs, 0), np.where(nonzero, rng.choice((-1, 1), nonzero.shape), 0)
    size = [len(encode(as_bytes(codes).ravel(), "mixing", width=400)) for codes in (rank1, free)]
    assert nonzero.sum() * 0.99 < 8 * (size[1] - mask_bytes(nonzero.size, int(nonzero.sum())))
    assert 8 * (size[1] - size[0]) > 0.65 * nonzero.sum()
