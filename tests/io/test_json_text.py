"""JSON text: strict parsing, and deflate within limits."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import FormatError
from tersor.io.dictionary import DICTIONARY
from tersor.io.json_text import FREE, RATIO, allowed, deflate, dump, inflate, parse

TEXTS = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_json_round_trips(value: object) -> None:
    assert parse(dump(value), "it") == value


@given(st.binary(max_size=40) | st.text('{}[]",:0123456789.eE-+\\udnNaIft ').map(str.encode))
def test_anything_is_json_or_refused(raw: bytes) -> None:
    try:
        value = parse(raw, "it")
    except FormatError as error:
        assert str(error).startswith("it is not")  # noqa: PT017
        return
    assert parse(dump(value), "it") == value


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"a":1,"b":{"c":1,"c":2}}', "the key 'c' is there twice"),
        (b"[NaN]", "NaN is not a number of JSON"),
        (b"[-Infinity]", "-Infinity is not a number of JSON"),
        (b"[1e400]", "the number 1e400 is too large"),
        (b"[" * 65 + b"]" * 65, "brackets nest deeper than 64"),
        (b'{"a":' * 100_000, "brackets nest deeper than 64"),
        (b"[1", "it is not JSON"),
        (b"\xff", "it is not UTF-8"),
        ('{"a":1}'.encode("utf-16"), "it is not UTF-8"),
        (b'["\\udc00"]', "it is not UTF-8"),
        (b"1" * 5000, "it is not JSON"),
        (b"", "it is not JSON"),
    ],
)
def test_what_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse(raw, "it")


def test_valid_texts_are_not_refused() -> None:
    assert parse(b"[" * 64 + b"]" * 64, "it")
    assert parse(b'["' + b"[" * 500 + b'\\"{"]', "it") == ["[" * 500 + '"{']
    assert parse(b'["\\ud83d\\ude00"]', "it") == ["\N{GRINNING FACE}"]


@given(st.binary(max_size=300), st.binary(max_size=40))
def test_text_round_trips_with_the_bytes_after_it(text: bytes, rest: bytes) -> None:
    text = b"{}" + text
    assert inflate(deflate(text) + rest, len(text)) == (text, rest)


@given(st.binary(max_size=60), st.integers(0, 100))
def test_any_bytes_inflate_or_are_refused(data: bytes, size: int) -> None:
    try:
        text, _ = inflate(data, size)
    except FormatError:
        return
    assert len(text) == size


@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_another_length_is_refused(change: int) -> None:
    text = b'{"sites":{}}' * 100
    with pytest.raises(FormatError, match="not the 1,|not the 2,"):
        inflate(deflate(text), len(text) + change)


def test_length_beyond_what_the_bytes_justify_is_refused_before_anything_is_inflated() -> None:
    with pytest.raises(FormatError, match=f"100 bytes justify 2 to {FREE + 100 * RATIO:,}"):
        inflate(b"\0" * 100, FREE + 100 * RATIO + 1)


@pytest.mark.parametrize("size", [1000, 10**5, 3 * 10**6])
def test_a_text_that_deflates_too_well_uses_a_lower_level(size: int) -> None:
    text = b'{"sites":{}' + b" " * size + b"}"
    data = deflate(text)
    assert len(text) <= allowed(len(data))
    assert inflate(data, len(text)) == (text, b"")


def test_dictionary_is_worth_it() -> None:
    text = b'{"sites":{"fc1.weight":{"shape":[300,784],"kind":"linear","digest":"50ee98","form":"dense"}}}'
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    assert len(deflate(text)) < 0.7 * len(packer.compress(text) + packer.flush())
    assert DICTIONARY.isascii()
