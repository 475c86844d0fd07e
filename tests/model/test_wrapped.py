"""Wrapped: a wrapped model is stored by its own names, and a scripted one is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny
from torch import nn

import tersor
from tersor import Entropy, Prune, RefusedError

WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_file_is_that_of_the_model_inside(wrap: str, tmp_path: Path) -> None:
    t, steps = tiny("conv"), [Prune(keep=0.4, epochs=1), Entropy()]
    plain = tersor.run(t.model, steps, t.task)
    result = tersor.run(WRAPS[wrap](t.model), steps, t.task)
    assert result.state_dict().keys() == t.model.state_dict().keys()
    assert result.digest == plain.digest
    assert type(result.model()) is type(t.model)
    tersor.save(result, tmp_path / "m.tersor")
    assert torch.equal(
        t.out(tersor.load(tmp_path / "m.tersor").model(WRAPS[wrap](t.model))), t.out(plain.model())
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model_is_refused_with_the_way_out() -> None:
    t = tiny("mlp")
    for made in (torch.jit.script(t.model), torch.jit.trace(t.model, t.x)):
        with pytest.raises(RefusedError, match=r"a TorchScript.*give the nn\.Module"):
            tersor.run(made, [Prune()])
