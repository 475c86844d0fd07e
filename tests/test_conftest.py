"""The guards in conftest.py catch their faults."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.model import given_model

pytest_plugins = ["pytester"]

CHANGES = {
    "grad enabled": "torch.set_grad_enabled(False)",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "matmul precision": "torch.set_float32_matmul_precision('medium')",
}


@pytest.fixture(scope="module")
def loaded() -> None:
    """pytester forgets what was first imported under it, and parts of torch cannot be imported twice."""
    given_model.traced(nn.Linear(1, 1), (torch.ones(1, 1),))


@pytest.fixture
def inner(loaded: None, pytester: pytest.Pytester) -> pytest.Pytester:
    """A separate folder with this folder's conftest.py."""
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


def test_only_what_has_the_same_trace_is_traced_once(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
        import pytest
        import torch
        from torch import nn

        from tersor.model import given_model

        X = (torch.randn(2, 3),)

        def net(**options):
            return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LeakyReLU(**options)).eval()

        def tied():
            model = net()
            model[1].weight = model[0].weight
            return model

        def frozen():
            model = net()
            model[0].weight.requires_grad_(False)
            return model

        def test_other_numbers_change_no_trace():
            assert given_model.traced(net(), X) is given_model.traced(net(), (torch.randn(2, 3),))

        @pytest.mark.parametrize(("model", "x"), [
            (net(negative_slope=0.5), X), (net().train(), X), (net(), (torch.randn(4, 3),)), (tied(), X),
            (net(), {"input": X[0]}), (net().double(), (X[0].double(),)), (frozen(), X), (net()[:2], X),
            (nn.Sequential(*net(), nn.Linear(3, 3)), X), (net(), (torch.randn(3, 2).T,)),
        ])
        def test_other_structures_do(model, x):
            assert given_model.traced(model, x) is not given_model.traced(net(), X)

        def test_so_do_other_settings_of_torch():
            model, x = net(), (X[0].clone(),)
            before = given_model.traced(model, x)
            torch.set_default_dtype(torch.float64)
            after = given_model.traced(model, x)
            torch.set_default_dtype(torch.float32)
            assert before is not after

        class Own(nn.Module):
            hidden = False

            def __getstate__(self):
                return {}

            def forward(self, x):
                return x.relu() if self.hidden else x.tanh()

        def names(model):
            return [node.target._opname for node in given_model.traced(model, X).nodes]

        def test_so_does_code_of_a_test(monkeypatch):
            model = Own()
            assert names(model) == names(nn.Sequential(model)) == ["tanh"]
            model.hidden = True
            assert names(model) == names(nn.Sequential(model)) == ["relu"]
            monkeypatch.setattr(Own, "forward", lambda self, x: x.sigmoid())
            assert names(model) == names(nn.Sequential(model)) == ["sigmoid"]

        def helper(x):
            return x.tanh()

        class Reads(nn.Module):
            def __init__(self, shift=0.0):
                super().__init__()
                self.shift = torch.full((3,), shift)

            def forward(self, x, op=torch.relu):
                return op(helper(x)) + self.shift

        def test_code_that_is_the_same_is_traced_once():
            assert given_model.traced(Reads(), X) is given_model.traced(Reads(), X)

        def test_so_do_globals_that_code_reads(monkeypatch):
            assert names(Reads())[:2] == ["tanh", "relu"]
            monkeypatch.setitem(globals(), "helper", lambda x: x.exp())
            assert names(Reads())[:2] == ["exp", "relu"]

        def test_so_do_defaults(monkeypatch):
            monkeypatch.setattr(Reads.forward, "__defaults__", (torch.sigmoid,))
            assert names(Reads())[:2] == ["tanh", "sigmoid"]

        def test_so_do_cells():
            def made(op):
                class Made(nn.Module):
                    def forward(self, x):
                        return op(x)
                return Made()

            assert names(made(torch.exp)) == ["exp"]
            assert names(made(torch.sin)) == ["sin"]

        def test_so_do_numbers_that_the_trace_holds():
            for shift in (1.0, 2.0):
                (held,) = given_model.traced(Reads(shift), X).program.constants.values()
                assert held.tolist() == [shift] * 3
        """
    )
    inner.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=18)
