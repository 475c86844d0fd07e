"""JSON text: the JSON of a file, parsed strictly and deflated with a preset dictionary.

bytes   about 4 for a number, 9 for a digest of 16 hex digits, 2 for a repeated word (RFC 1951)
A reader inflates at most the length that the metadata states: docs/format.md sections 3 and 9.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from typing import Any

from tersor.errors import FormatError
from tersor.io.dictionary import DICTIONARY

Json = dict[str, Any]  # a JSON object

RATIO, FREE = 32, 65536  # a text may have FREE bytes, plus RATIO per deflated byte
NESTED = 64  # levels of nested brackets, so that no reader overflows its stack

STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
BRACKET = re.compile(r"[\[\]{}]")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(raw: bytes, what: str) -> Any:
    """The JSON value in `raw`. FormatError for duplicate keys, NaN, deep nesting and what is not JSON."""
    try:
        text = raw.decode("utf-8")
        check_nesting(text)
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
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
    """Compact JSON in UTF-8. ValueError for NaN, TypeError for values that JSON cannot hold."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def allowed(nbytes: int, head: bytes = b"") -> int:
    """The longest text that this many deflated bytes and this head of the dictionary may hold."""
    return FREE + RATIO * nbytes + len(head)


def deflate(text: bytes, dictionary: bytes = DICTIONARY, head: bytes = b"") -> bytes:
    """The text, deflated into as few bytes as a reader accepts: it limits the ratio. `head`: appended to the
    dictionary; for a patch the JSON of OLD."""
    for level in (9, 1, 0):
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary + head)
        data = packer.compress(text) + packer.flush()
        if len(text) <= allowed(len(data), head):
            break
    return data


def inflate(data: bytes, size: int, head: bytes = b"") -> tuple[bytes, bytes]:
    """(the text, the bytes after it). FormatError unless the text is exactly `size` bytes long."""
    most = allowed(len(data), head)
    if not 2 <= size <= most:
        raise FormatError(
            f"its metadata states a text of {size:,} bytes, but {len(data):,} bytes justify 2 to {most:,}"
        )
    text, rest, whole = inflate_up_to(data, size, DICTIONARY + head)
    if len(text) != size or not whole:
        raise FormatError(f"its text is not the {size:,} bytes that the metadata states: the file is damaged")
    return text, rest


def inflate_up_to(data: bytes, most: int, dictionary: bytes) -> tuple[bytes, bytes, bool]:
    """(the text or its first `most` bytes, the bytes after it, whether the text ends there)."""
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
    """The value, if its type is exactly this one (a bool is not an int); else FormatError."""
    if type(value) is not kind:
        words = {
            dict: "an object",
            list: "a list",
            str: "a string",
            int: "a whole number",
            bool: "true or false",
        }
        raise FormatError(f"{who} must be {words[kind]}, not {str(value)[:60]!r}")
    return value


def only(entry: dict[str, Any], allowed: tuple[str, ...], who: str) -> None:
    unknown = [key for key in entry if key not in allowed]
    if unknown:
        raise FormatError(f"{who} has no key {unknown[0][:40]!r}; known are {', '.join(allowed)}")
