"""Settings from text and back: YAML, the command line and Python give the same typed value."""

import typing
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import SettingError, did_you_mean
from tersor.settings import check, check_word, convert, make, settings_of
from tersor.steps import STEPS


@dataclass(frozen=True, kw_only=True)
class Toy:
    name: ClassVar[str] = "toy"
    keep: float = 0.5
    bits: int = 8
    rank: int | None = None
    share: float | None = None
    fast: bool = False
    word: str = "row"
    where: str | tuple[str, ...] = "*"
    teacher: Any = ""

    def __post_init__(self) -> None:
        check(0 < self.keep <= 1, self, "keep", "it is the share kept: 0 < keep <= 1")
        check_word(self, "word", ("tensor", "row", "group"))


# (hint, what was written, what it is)
FINE: list[tuple[Any, Any, Any]] = [
    (float, "0.25", 0.25), (float, "1e-3", 1e-3), (float, 1, 1.0), (float, 0.5, 0.5), (float, ".5", 0.5),
    (int, "4", 4), (int, 4, 4), (int, 4.0, 4), (int, "-1", -1),
    (bool, True, True), (bool, "true", True), (bool, "No", False), (bool, "0", False), (bool, 1, True),
    (str, "row", "row"), (str, "8", "8"), (str, 8, "8"), (str, "", ""),
    (int | None, "none", None), (int | None, None, None), (int | None, "", None), (int | None, "3", 3),
    (float | None, "null", None), (float | None, "0.1", 0.1),
    (str | tuple[str, ...], "a,b", "a,b"), (str | tuple[str, ...], ["a", "b"], ("a", "b")),
    (str | None, "2:4", "2:4"), (Any, "", ""), (Any, 3, 3), (Any, [1], [1]),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "given", "want"), FINE, ids=str)
def test_converted(hint: Any, given: Any, want: Any) -> None:
    found = convert(given, hint, "toy: x")
    assert found == want
    assert type(found) is type(want)


WRONG: list[tuple[Any, Any]] = [
    (float, "half"), (float, True), (float, [0.5]), (float, {}), (float, None), (int, 2.5), (int, "2.5"),
    (int, True), (int, None), (int, float("nan")), (int, float("inf")),
    (float, 10**400), (bool, "maybe"), (bool, 2), (bool, []), (str, True),
    (str, ["a"]), (str, {"a": 1}), (str, None), (int | None, "x"), (float | None, []),
    (str | tuple[str, ...], [1, 2]), (str | tuple[str, ...], {"a": 1}), (str | tuple[str, ...], None),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "given"), WRONG, ids=str)
def test_misfits_are_refused_with_what_was_given(hint: Any, given: Any) -> None:
    with pytest.raises(SettingError) as caught:
        convert(given, hint, "toy: x")
    assert str(caught.value).startswith(f"toy: x={given!r}"[:100])
    assert ", but it must be " in str(caught.value)


@given(st.floats(0.001, 1), st.integers(1, 16), st.one_of(st.none(), st.integers(1, 99)), st.booleans())
def test_settings_survive_text(keep: float, bits: int, rank: int | None, fast: bool) -> None:
    toy = Toy(keep=keep, bits=bits, rank=rank, fast=fast, where=("a.*", "!b"))
    assert make(Toy, settings_of(toy)) == toy
    words = {key: value if isinstance(value, list) else str(value) for key, value in settings_of(toy).items()}
    assert make(Toy, words) == toy


def test_json_values_only() -> None:
    assert settings_of(Toy(where=("a", "b")))["where"] == ["a", "b"]


def test_an_unknown_setting_names_the_near_one() -> None:
    with pytest.raises(SettingError, match=r"toy: no setting 'kepe'; did you mean 'keep'\? Allowed: bits, "):
        make(Toy, {"kepe": 0.5})


def test_range_and_word() -> None:
    with pytest.raises(SettingError, match=r"^toy: keep=1.5, but it is the share kept: 0 < keep <= 1$"):
        Toy(keep=1.5)
    with pytest.raises(
        SettingError, match=r"toy: word='rwo'; did you mean 'row'\? Allowed: group, row, tensor"
    ):
        Toy(word="rwo")


def test_far_words_get_no_guess() -> None:
    assert did_you_mean("zzz", ["row", "group"]) == "Allowed: group, row"
    assert did_you_mean("rwo", ["row", "group"]) == "did you mean 'row'? Allowed: group, row"


# For each declared type: Python values of other types.
NO_NUMBER: list[Any] = ["1", "x", "", "none", True, [1], {}, object()]
ODD: dict[Any, list[Any]] = {
    float: [*NO_NUMBER, None, 10**400], float | None: NO_NUMBER,
    int: [*NO_NUMBER, None, 2.5, float("inf")], int | None: [*NO_NUMBER, 2.5],
    bool: ["yes", "", 2, None, [True]], str: [3, None, True, ["a"], b"a"], str | None: [3, True, ["a"], b"a"],
    str | tuple[str, ...]: [3, None, {"a": 1}, [1], {"a"}, b"a", "", ()],
    Any: [3, object(), {"a": "x"}, [["a"]]],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), [(kind, f.name) for kind in STEPS.values() for f in fields(kind)])
def test_a_setting_of_another_type_is_refused(kind: Any, key: str) -> None:
    for value in ODD[typing.get_type_hints(kind)[key]]:
        with pytest.raises(SettingError, match=f"^{kind.name}: {key}="):
            kind(**{key: value})


@pytest.mark.parametrize("kind", STEPS.values())
def test_numbers_of_numpy_and_lists_become_python_values(kind: Any) -> None:
    usual = settings_of(kind())
    wrapped = {int: np.int64, float: np.float64, bool: np.bool_}
    given = {key: wrapped.get(type(value), lambda x: x)(value) for key, value in usual.items()}
    if "where" in usual:
        usual["where"], given["where"] = ["a", "b"], ["a", "b"]
    made = kind(**given)
    assert settings_of(made) == usual
    assert {key: type(value) for key, value in settings_of(made).items()} == {
        key: type(value) for key, value in usual.items()
    }
    assert isinstance(hash(made), int)
