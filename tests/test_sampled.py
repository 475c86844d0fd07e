"""What stays of a table shows every value in every place, and the rest is left for make test-wide."""

import itertools

import pytest
from sampled import sample

pytest_plugins = ["pytester"]
NAMES = [f"step{number}" for number in range(14)]


def pairs(names: list[str]) -> dict[str, dict[str, object]]:
    return {f"{a}-{b}": {"first": a, "second": b} for a, b in itertools.product(names, repeat=2)}


@pytest.mark.parametrize("each", [1, 3])
def test_each_step_is_first_and_second(each: int) -> None:
    table = pairs(NAMES)
    stay = sample(list(table.items()), each=each)
    for place in ("first", "second"):
        found = [table[name][place] for name in stay]
        assert all(found.count(step) >= each for step in NAMES)
    assert len(stay) <= 1.5 * each * len(NAMES)
    assert sum(table[name]["first"] == table[name]["second"] for name in stay) <= len(stay) / 4


def test_a_new_step_is_in_the_sample_in_both_places() -> None:
    stay = sample(list(pairs([*NAMES, "new"]).items()))
    assert any(name.startswith("new-") for name in stay)
    assert any(name.endswith("-new") for name in stay)


def test_the_order_of_the_table_does_not_matter() -> None:
    cases = list(pairs(NAMES).items())
    assert sample(cases) == sample(cases[::-1]) == sample(cases[50:] + cases[:50])


def test_places_of_a_tuple_count_for_themselves() -> None:
    table = {"-".join(pair): {"pair": pair} for pair in itertools.product("abcd", repeat=2)}
    stay = sample(list(table.items()))
    assert [{name[place] for name in stay} for place in (0, 2)] == [set("abcd")] * 2
    assert len(stay) < 16


def test_arguments_alone_together_and_fixed() -> None:
    table = {
        f"{a}-{b}-{c}": {"a": a, "b": b, "c": c} for a, b, c in itertools.product("xy", (0, True), range(9))
    }
    cases = list(table.items())
    assert len(sample(cases, "a")) == 2
    assert len(sample(cases)) == 9
    both = sample(cases, ("a", "b"))
    assert {(table[name]["a"], table[name]["b"]) for name in both} == {*itertools.product("xy", (0, True))}
    assert len(both) == 4
    fixed = sample(cases, c=(3, 5), b=True)
    assert {(table[name]["a"], table[name]["c"]) for name in fixed} in (
        {("x", 3), ("y", 5)},
        {("x", 5), ("y", 3)},
    )
    assert len(sample(cases, each=1000)) == len(cases)


def test_what_no_case_has_is_refused() -> None:
    cases = list(pairs(NAMES).items())
    with pytest.raises(ValueError, match="no argument 'frist'; there are first, second"):
        sample(cases, "frist")
    for wrong in ({"first": "step99"}, {"first": ("step1", "step99")}, {"frist": "step1"}):
        with pytest.raises(ValueError, match="sampled: no case has"):
            sample(cases, **wrong)


@pytest.fixture
def inner(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(
        """
        import pytest, sampled

        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(items):
            sampled.mark_wide(items)
        """
    )
    pytester.makeini("[pytest]\nmarkers =\n  wide\n  long\n  extra\n  sampled")
    return pytester


def ids(inner: pytest.Pytester, *words: str) -> list[str]:
    """What is collected."""
    out = inner.runpytest("--collect-only", "-q", *words).stdout.lines
    return [line for line in out if "::" in line]


def test_quick_and_wide_are_all_tests_and_none_twice(inner: pytest.Pytester) -> None:
    """Cases that are long or extra anyway show nothing in make test, and do not stand for others."""
    inner.makepyfile(
        """
        import pytest
        dear = pytest.param(0, marks=pytest.mark.long)

        @pytest.mark.sampled
        @pytest.mark.parametrize("b", range(4))
        @pytest.mark.parametrize("a", [dear, 1, 2])
        def test_table(a, b): pass

        @pytest.mark.wide
        def test_slow(): pass

        def test_other(): pass
        """
    )
    quick, wide = ids(inner, "-m", "not long and not wide"), ids(inner, "-m", "wide and not long")
    both = ids(inner, "-m", "not long")
    assert len(both) == 10
    assert sorted(quick + wide) == sorted(both)
    assert len(quick) == 5
    assert [sum(f"[{a}-" in name for name in quick) for a in (0, 1, 2)] == [0, 2, 2]


def test_a_misspelt_value_stops_the_run_and_a_case_that_is_named_runs(inner: pytest.Pytester) -> None:
    path = inner.makepyfile(
        """
        import pytest

        @pytest.mark.sampled(a="x")
        @pytest.mark.parametrize("a", ["x", "y"])
        def test_good(a): pass
        """
    )
    assert ids(inner, "-m", "not wide") == [f"{path.name}::test_good[x]"]
    named = f"{path.name}::test_good[y]"
    assert ids(inner, "-m", "not wide", named) == [named]
    path.write_text(path.read_text().replace('a="x"', 'a="z"'))
    done = inner.runpytest("--collect-only", "-q")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*::test_good: sampled: no case has a='z'*"])
