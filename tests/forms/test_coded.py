"""Coded leaves: every dtype round-trips bit for bit, with and without a mask above; damage is refused."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_forms import SHAPES, Shape, forms
from torch import Tensor

from tersor.dtypes import CODED
from tersor.encode import coded, coded_like
from tersor.errors import FormatError
from tersor.forms import Affine, Coded, Dense, Form, LowRank, Masked, Sum, uncoded
from tersor.forms.form import as_bytes

CODERS = ("raw", "raw", "fast", "max", "huffman", "rans")
each_dtype = pytest.mark.parametrize("dtype", CODED.values(), ids=list(CODED))


def noise(shape: Shape, dtype: torch.dtype, seed: int, skewed: bool) -> Tensor:
    """Any bytes at all (NaN payloads too), or few values that a coder shortens."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool or skewed:
        return (torch.rand(shape, generator=generator) < 0.2).to(dtype)
    raw = torch.randint(256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


@each_dtype
def test_uncoded_is_the_inverse_of_coded(dtype: torch.dtype) -> None:
    @given(st.sampled_from(SHAPES), st.integers(0, 999), st.booleans(), st.sampled_from(CODERS))
    def check(shape: Shape, seed: int, skewed: bool, coder: str) -> None:
        array = noise(shape, dtype, seed, skewed)
        form = coded(array, coder=coder)
        back = form.decode()
        assert (form.shape, back.shape, back.dtype) == (shape, array.shape, dtype)
        assert bytes(as_bytes(back)) == bytes(as_bytes(array))
        assert isinstance(uncoded(form), Dense)

    check()


@each_dtype
def test_under_a_mask_only_kept_elements_round_trip(dtype: torch.dtype) -> None:
    @given(st.sampled_from(SHAPES), st.integers(0, 999), st.booleans(), st.sampled_from((0.0, 0.3, 1.0)))
    def check(shape: Shape, seed: int, skewed: bool, share: float) -> None:
        array = noise(shape, dtype, seed, skewed)
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < share
        form = coded(array, keep)
        assert bytes(as_bytes(form.decode(keep)[keep])) == bytes(as_bytes(array[keep]))
        whole = Masked(Dense(keep), form)
        assert isinstance(uncoded(whole).body, Dense)
        assert bytes(as_bytes(uncoded(whole).decode())) == bytes(as_bytes(whole.decode()))
        assert not whole.decode()[~keep].any()

    check()


def test_a_lone_signaling_nan_under_a_mask_keeps_its_bits() -> None:
    """torch fills a single place through a double, which makes the NaN quiet."""
    array = torch.tensor([0, 0x7CEC, 0], dtype=torch.int16).view(torch.float16)
    keep = torch.tensor([False, True, False])
    assert coded(array, keep).decode(keep).view(torch.int16).tolist() == [0, 0x7CEC, 0]


def test_strides_do_not_matter() -> None:
    array = torch.arange(24, dtype=torch.int16).reshape(2, 3, 4).permute(2, 0, 1)
    assert torch.equal(coded(array).decode(), array)
    keep = (torch.arange(24).reshape(4, 2, 3) % 3 == 0).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(coded(array, keep).decode(keep)[keep], array[keep])


def test_planes_are_little_endian_and_in_order() -> None:
    """The bytes of element k are symbol k of each plane, the lowest byte in the first plane."""
    array = torch.tensor([1.5, -2.25, 3e38])
    streams = [struct.pack("<f", float(value)) for value in array]
    form = coded(array)
    data, start = form.data.numpy().tobytes(), 0
    for plane, length in enumerate(form.planes):
        stream = data[start : start + length]
        assert stream[0] & 7 == 0, "three different bytes are raw"
        start += length
        symbols = torch.tensor([streams[k][plane] for k in range(3)])
        assert torch.equal(form.replace().decode().view(torch.uint8).reshape(3, 4)[:, plane].long(), symbols)


def test_a_mask_is_packed_if_that_is_shorter() -> None:
    half = torch.arange(4096) % 2 == 0  # packed: a constant byte; else one bit each
    assert coded(half).pack
    assert torch.equal(coded(half).decode(), half)
    few = torch.zeros(4096, dtype=torch.bool)
    few[torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:40]] = True
    assert len(coded(few).data) < 4096 // 8


def test_skewed_codes_get_close_to_their_entropy() -> None:
    array = (torch.rand(8192, generator=torch.Generator().manual_seed(0)) < 0.05).to(torch.int8)
    assert coded(array).nbytes < 8192 * 0.2865 / 8 * 1.05 + 40


@given(forms("masked"))
def test_uncoded_trees_decode_the_same(form: Form) -> None:
    plain = uncoded(form)
    assert not any(isinstance(node, Coded) for _, node in plain.walk())
    assert torch.equal(plain.decode(), form.decode())


def test_recoded_codes_only_leaves_that_were_coded() -> None:
    """Each leaf is coded with the profile that it had; dense ones stay dense though a coder would help."""
    zeros = Dense(torch.zeros(64, 64, dtype=torch.int8))
    form = Sum(Sum(zeros, zeros), zeros)
    like = Sum(Sum(coded(zeros, coder="fast"), zeros), coded(zeros, coder="huffman"))
    found = coded_like(form, like)
    assert isinstance(found, Sum)
    assert isinstance(found.a, Sum)
    assert [getattr(leaf, "coder", None) for leaf in (found.a.a, found.a.b, found.b)] == [
        "fast",
        None,
        "huffman",
    ]
    assert coded_like(form, form) is form


def test_uncoded_keeps_a_plain_tree_as_it_is() -> None:
    form = Sum(Dense(torch.ones(2)), Dense(torch.ones(2)))
    assert uncoded(form) is form


def test_a_mask_reaches_through_sums_and_masks_not_through_factors() -> None:
    keep = torch.tensor([[True, False, True], [False, True, False]])
    inner = torch.tensor([[True, True, False], [False, True, True]])
    w = torch.arange(1.0, 7.0).reshape(2, 3)
    tree = Masked(Dense(keep), Sum(coded(w, keep), Masked(Dense(inner), coded(w, keep & inner))))
    assert torch.equal(tree.decode(), w * keep + w * (keep & inner))
    factors = LowRank(coded(torch.ones(2, 1)), coded(torch.ones(1, 3)))
    assert torch.equal(Masked(Dense(keep), factors).decode(), keep.float())


GOOD = coded(torch.tensor([3, 1, 2, 2], dtype=torch.int16))
DAMAGED: dict[str, Coded] = {
    "planes do not add up": GOOD.replace(planes=(GOOD.planes[0], GOOD.planes[1] + 1)),
    "a plane too few": GOOD.replace(planes=(sum(GOOD.planes),)),
    "cut off": GOOD.replace(data=GOOD.data[:-1]),
    "size": GOOD.replace(size=(5000,)),
    "dtype of another width": GOOD.replace(dtype="int8"),
    "unknown dtype": GOOD.replace(dtype="float4"),
    "kept without a mask": GOOD.replace(kept=True),
    "unknown coder": GOOD.replace(data=torch.full_like(GOOD.data, 7)),
    "no stream": GOOD.replace(data=GOOD.data[:0], planes=(0, 0)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_a_format_error(name: str) -> None:
    with pytest.raises(FormatError):
        DAMAGED[name].decode()


def test_a_mask_of_another_shape_is_refused() -> None:
    form = coded(torch.ones(4), torch.tensor([True, False, True, True]))
    with pytest.raises(FormatError, match="no mask of its shape"):
        form.decode(torch.ones(2, 2, dtype=torch.bool))


def test_a_cut_under_a_mask_cuts_mask_and_body() -> None:
    keep = torch.tensor([[True, False, True], [False, True, False]])
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    form = Masked(coded(keep), Affine(coded(codes, keep), Dense(torch.tensor([[2.0], [0.5]]))))
    cut = form.take(1, torch.tensor([2, 0]))
    assert cut.decode().tolist() == [[6.0, 2.0], [0.0, 0.0]]


# --- coded again with the same profile ---


def test_a_leaf_stores_its_profile() -> None:
    w = torch.arange(3000) % 5
    assert [coded(w, coder=name).coder for name in ("max", "fast", "huffman", "rans")] == [
        "max", "fast", "huffman", "rans"
    ]  # fmt: skip
    assert coded(w).settings().get("coder") is None
    assert coded(w, coder="mixing").coder == "max"  # not a profile: one coder for one leaf
    many = torch.randn(1 << 17)
    assert coded(many).coder == "max"  # although many floats are coded with `fast`


W = (torch.arange(9000) % 9 - 4).reshape(90, 100).to(torch.int8)
KEEP = W > 0
STEPS = torch.ones(90, 20)
LIKE = Masked(
    coded(KEEP, coder="huffman"),
    Affine(coded(W, KEEP, "rans"), Dense(STEPS), coded((W[:, :20] * 0).short()), group=5),
)


def test_recoded_is_the_inverse_of_uncoded() -> None:
    plain = uncoded(LIKE)
    again = coded_like(plain, LIKE)
    assert again.digest == LIKE.digest
    assert coded_like(plain, plain) is plain


def test_a_cut_form_is_coded_with_the_same_profile() -> None:
    cut = coded_like(LIKE.take(1, torch.arange(7, 98)), LIKE)
    nodes = dict(cut.walk())
    coders = {path: node.coder for path, node in nodes.items() if isinstance(node, Coded)}
    assert coders == {"keep": "huffman", "body.codes": "rans", "body.zero": "max"}
    assert isinstance(nodes["body.scale"], Dense)  # unchanged, although a coder would shorten it
    assert nodes["body.codes"].kept
    assert torch.equal(cut.decode(), LIKE.decode()[:, 7:98])


def test_new_leaves_are_coded_like_the_first() -> None:
    both = Sum(Affine(Dense(W), Dense(STEPS), group=5), Dense(torch.zeros(90, 100)))
    assert {node.coder for _, node in coded_like(both, LIKE).walk() if isinstance(node, Coded)} == {"huffman"}


def test_leaves_that_no_coder_shortens_stay_dense() -> None:
    assert isinstance(coded_like(Dense(torch.arange(4)), coded(torch.zeros(4000))), Dense)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(FormatError, match="coder 'best' is not known; known are max, fast, huffman, rans"):
        coded(W).replace(coder="best").decode()
