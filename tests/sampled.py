"""A sample of a large table of cases stays in `make test`. The other cases get the mark `wide`.

    @pytest.mark.sampled                        each value of each argument is in a case that stays
    @pytest.mark.sampled(each=3)                in three, or in all that there are
    @pytest.mark.sampled("first", "second")     values of these arguments; the others come as they come
    @pytest.mark.sampled(("name", "trained"))   two arguments that count as one: each pair of their values
    @pytest.mark.sampled(net="mlp")             only cases with this value, or with one of ("mlp", "conv")

Of a tuple, each place counts for itself. So a step that is added to a table is in the sample, in each place
of a pair. Each time the case is taken that has the most values still missing; of equals, the one whose name
has the smallest CRC: cases are not taken in the order of the table, which would be the diagonal of all pairs.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import pytest

Case = tuple[str, dict[str, Any]]  # its name, and the value of each argument
APART = ("wide", "long", "extra")  # what make test leaves out or skips shows nothing there


def sample(cases: list[Case], *together: str | tuple[str, ...], each: int = 1, **only: Any) -> set[str]:
    """The names of the cases that stay.

    Raises ValueError if no case has an argument or a value that is asked for.
    """
    for key, allowed in only.items():
        of_each = [
            [case for case in cases if key in case[1] and same(case[1][key], one)]
            for one in (allowed if isinstance(allowed, tuple) else (allowed,))
        ]
        if not all(of_each):
            raise ValueError(f"sampled: no case has {key}={allowed!r}, or one of these values")
        cases = [case for found in of_each for case in found]
    shown = {name: values(arguments, *together) for name, arguments in cases}
    missing = Counter(value for found in shown.values() for value in found)
    missing = Counter({value: min(count, each) for value, count in missing.items()})
    rest, taken = sorted(shown, key=lambda name: zlib.crc32(name.encode())), set()
    while rest and +missing:
        best = max(rest, key=lambda name: sum(missing[value] > 0 for value in shown[name]))
        rest.remove(best)
        taken.add(best)
        missing.subtract(shown[best])
    return taken


def values(arguments: dict[str, Any], *together: str | tuple[str, ...]) -> set[Hashable]:
    """What a case shows: pairs of a place and its value."""
    found = set()
    for names in together or tuple(arguments):
        names = (names,) if isinstance(names, str) else names
        if lost := set(names) - set(arguments):
            raise ValueError(f"sampled: no argument {sorted(lost)[0]!r}; there are {', '.join(arguments)}")
        one = arguments[names[0]]
        if len(names) == 1 and isinstance(one, tuple):
            found |= {(*names, place, key_of(part)) for place, part in enumerate(one)}
        else:
            found.add((*names, *(key_of(arguments[name]) for name in names)))
    return found


def key_of(value: Any) -> Hashable:
    """Equal for equal values, where these can be compared at all."""
    return (type(value), value) if isinstance(value, str | int | float | None) else id(value)


def same(value: Any, wanted: Any) -> bool:
    """A function or a class may be given by its name."""
    if value is wanted or getattr(value, "__name__", None) == wanted:
        return True
    return type(value) is type(wanted) and value == wanted


def mark_wide(items: Iterable[pytest.Item]) -> None:
    """Give the mark `wide` to all cases of sampled tests but the sample."""
    tables = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not any(map(item.get_closest_marker, APART)):
            tables[item.nodeid.partition("[")[0]].append(item)
    for where, table in tables.items():
        mark = table[0].get_closest_marker("sampled")
        cases = [(item.nodeid, item.callspec.params if hasattr(item, "callspec") else {}) for item in table]
        try:
            stay = sample(cases, *mark.args, **mark.kwargs)
        except ValueError as error:
            if any("[" in word for word in table[0].config.args):  # single cases were named, and these run
                continue
            raise pytest.UsageError(f"{where}: {error}") from error
        for item in table:
            if item.nodeid not in stay:
                item.add_marker(pytest.mark.wide)
