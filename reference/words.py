"""Words: section 3 of docs/format.md, strict JSON, and checks of numbers, shapes and digests."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from formulas import BadFile, check


def natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def parse(raw: bytes) -> Any:
    """Parse JSON. Refuses duplicate keys, NaN, infinity, and brackets nested more than 64 deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(pairs)) == len(pairs), "a duplicate key")
        return dict(pairs)

    def number(digits: str) -> float:
        check(math.isfinite(float(digits)), f"{digits} is not finite")
        return float(digits)

    try:
        text = raw.decode("utf-8")
        depth = 0
        for mark in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
            depth += 1 if mark in "[{" else -1
            check(depth <= 64, "brackets are nested too deep")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
    except BadFile:
        raise
    except ValueError as error:
        raise BadFile(f"not JSON: {error}") from None
    return value


def below_31_bits(value: Any) -> bool:
    return natural(value) and value < 2**31


def check_shape(shape: Any) -> tuple[int, ...]:
    fine = isinstance(shape, list) and len(shape) <= 16 and all(natural(n) for n in shape)
    check(fine and math.prod(n for n in shape if n) < 2**62, f"not a shape: {shape}")
    return tuple(shape)


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None
