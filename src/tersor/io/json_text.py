"""Text: the JSON of a file, read strictly and deflated with a preset dictionary.

bytes ~ 4 for a number, 9 for a digest of 16 hex digits, 2 for a word that was there before (RFC 1951)
A reader inflates no further than the length that the metadata tells: docs/format.md sections 3 and 9.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from typing import Any

from tersor.errors import FormatError
from tersor.io.dictionary import DICTIONARY

Json = dict[str, Any]  # an object of a text

RATIO, FREE = 32, 65536  # a text may be this many times its deflated bytes, and so long in any case
NESTED = 64  # brackets in brackets: no reader's stack is tried

STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
BRACKET = re.compile(r"[\[\]{}]")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(raw: bytes, what: str) -> Any:
    """The JSON value in `raw`; FormatError for all that is not plain JSON: double keys, NaN, huge nesting."""
    try:
        text = raw.decode("utf-8")
        check_nesting(text)
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a pair is no character
    except UnicodeError as error:
        raise FormatError(
            f"{what} is not UTF-8: {error.reason if hasattr(error, 'reason') else error}"
        ) from None
    except ValueError as error:
        raise FormatError(f"{what} is not JSON: {error}") from None
    return value


def check_nesting(text: str) -> None:
    depth = 0
    for bracket in BRACKET.findall(STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > NESTED:
            raise ValueError(f"brackets nest deeper than {NESTED}")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double[:60]!r} is there twice")
    return found


def constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number of JSON")


def finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def dump(document: Any) -> bytes:
    """Compact JSON in UTF-8; ValueError for NaN, TypeError for what JSON cannot say."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def allowed(nbytes: int, head: bytes = b"") -> int:
    """The longest text that so many bytes justify, and a head of the dictionary beside them."""
    return FREE + RATIO * nbytes + len(head)


def deflate(text: bytes, dictionary: bytes = DICTIONARY, head: bytes = b"") -> bytes:
    """The text in as few bytes as may be, but not fewer than a reader asks for. `head`: what the dictionary
    ends with besides; for a patch what OLD says of its arrays."""
    for level in (9, 1, 0):
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary + head)
        data = packer.compress(text) + packer.flush()
        if len(text) <= allowed(len(data), head):
            break
    return data


def inflate(data: bytes, size: int, head: bytes = b"") -> tuple[bytes, bytes]:
    """(the text, what follows it). FormatError unless the text is exactly `size` bytes long."""
    most = allowed(len(data), head)
    if not 2 <= size <= most:
        raise FormatError(
            f"its metadata tells a text of {size:,} bytes, but {len(data):,} bytes justify 2 to {most:,}"
        )
    text, rest, whole = inflate_up_to(data, size, DICTIONARY + head)
    if len(text) != size or not whole:
        raise FormatError(f"its text is not the {size:,} bytes that the metadata tells: the file is damaged")
    return text, rest


def inflate_up_to(data: bytes, most: int, dictionary: bytes) -> tuple[bytes, bytes, bool]:
    """(the text or its first `most` bytes, what follows it, whether it ends there)."""
    unpacker = zlib.decompressobj(-15, dictionary)
    try:
        text = unpacker.decompress(data, most)
        more = unpacker.decompress(unpacker.unconsumed_tail, 1) if not unpacker.eof else b""
    except zlib.error as error:
        raise FormatError(f"its text cannot be inflated ({error}): the file is damaged") from None
    return text, unpacker.unused_data, unpacker.eof and not more


def digest(value: Any, who: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise FormatError(f"{who} must be 16 hex digits, not {str(value)[:40]!r}")
    return value


def of_type(value: Any, kind: type, who: str) -> Any:
    """The value, if it is exactly of this type: no bool is an int."""
    if type(value) is not kind:
        words = {
            dict: "an object",
            list: "a list",
            str: "a text",
            int: "a whole number",
            bool: "true or false",
        }
        raise FormatError(f"{who} must be {words[kind]}, not {str(value)[:60]!r}")
    return value


def only(told: dict[str, Any], allowed: tuple[str, ...], who: str) -> None:
    unknown = [key for key in told if key not in allowed]
    if unknown:
        raise FormatError(f"{who} has no key {unknown[0][:40]!r}; known are {', '.join(allowed)}")
