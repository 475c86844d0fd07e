"""The guards in conftest.py catch what they are there for."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CHANGES = {
    "grad enabled": "torch.set_grad_enabled(False)",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "matmul precision": "torch.set_float32_matmul_precision('medium')",
}


@pytest.fixture
def inner(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder of its own with this folder's conftest.py."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    return pytester


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_global_is_reported_and_put_back(inner: pytest.Pytester, name: str) -> None:
    inner.makepyfile(
        f"""
        import torch
        import conftest

        seen = []

        def test_notes_the_state():
            seen.append(conftest.GLOBALS[{name!r}][0]())

        def test_changes_it():
            {CHANGES[name]}

        def test_finds_it_as_it_was():
            assert seen == [conftest.GLOBALS[{name!r}][0]()]
        """
    )
    result = inner.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines([f"*changed torch's global state ({name}: *"])


def test_a_quiet_test_passes(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
        import torch

        def test_puts_it_back():
            with torch.no_grad():
                assert torch.ones(2).sum() == 2
        """
    )
    inner.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_missing_data_is_skipped_with_the_way_out(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHION_MNIST", "no-such-folder")
    inner.makepyfile("def test_on_images(fashion_mnist): raise AssertionError('not skipped')")
    result = inner.runpytest_inprocess("-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no-such-folder: install Debian's package dataset-fashion-mnist*"])
