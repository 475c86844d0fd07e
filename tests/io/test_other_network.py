"""Tensors of a file that are another network in the class as it was: unpack says so, or refuses a folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor.core.state import State
from tersor.errors import RefusedError
from tersor.io.container_writer import save
from tersor.io.other_network import other_network
from tersor.io.unpack import unpack
from tersor.report.file_sizes import sizes, unpacked_lines

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TASK = tersor.Task("images", evaluate=[(X, torch.zeros(64, dtype=torch.long))], calibrate=[(X,)])


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_var.fill_(0.1)  # type: ignore[union-attr]
    return model.eval()


def written(state: State, tmp_path: Path) -> Path:
    """The file of a state that came from a folder of transformers."""
    save(replace(state, attachments={"config.json": b"{}"}), tmp_path / "m.tersor")
    return tmp_path / "m.tersor"


def outputs_of(tensors: dict[str, Tensor]) -> Tensor:
    """What a loader computes that lists missing and unknown names, and runs."""
    model = net()
    model.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        found: Tensor = model.eval()(X)
    return found


def test_a_folder_of_another_network_is_refused(tmp_path: Path) -> None:
    state = tersor.run(net(), tersor.Fold(dead=False), TASK)
    path = written(state, tmp_path)
    unpack(path, tmp_path / "alone.safetensors")
    with torch.no_grad():
        given, kept = net()(X), state.model()(X)
    assert (kept - given).abs().max() < 1e-5 * given.abs().max()
    wrong = outputs_of(load_file(tmp_path / "alone.safetensors"))
    assert (wrong - given).abs().max() > 0.05 * given.abs().max()  # why it matters
    with pytest.raises(RefusedError, match=r"layers replaced: 1 left out.*config\.json.*another function"):
        unpack(path, f"{tmp_path}/back/")
    assert not (tmp_path / "back").exists()
    unpack(path, f"{tmp_path}/some/", only="0.weight")  # no configuration goes with it
    unpack(path, f"{tmp_path}/none.safetensors")
    save(state, tmp_path / "m.tersor")  # nobody builds a network from this folder
    unpack(path, f"{tmp_path}/back/")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (tersor.Fold(dead=False), "layers replaced: 1 left out"),
        (tersor.Slim(keep=0.6), "tensors of other sizes: "),
        (tersor.Quantize(activations=8, smooth=False), "edges with grids, which are not written: "),
        (tersor.Factorize(keep=0.5, layers=True, whiten=False), "made of several"),
    ],
)
def test_the_command_says_what_the_tensors_do_not_show(step: object, words: str, tmp_path: Path) -> None:
    path = written(tersor.run(net(), step, TASK), tmp_path)
    unpack(path, out := tmp_path / "w.safetensors")
    found = other_network(path)
    assert words in found
    *_, last = unpacked_lines(sizes(path, out) | {"only": [], "other_network": found})
    assert last.startswith(found)
    assert ".model(net) builds this one" in last


def test_tensors_that_show_all_are_not_said_to_be_another_network(tmp_path: Path) -> None:
    steps = [tersor.Prune(keep=0.5), tersor.Quantize(bits=4), tersor.Entropy()]
    path = written(tersor.run(net(), steps, TASK), tmp_path)
    assert other_network(path) == ""
    unpack(path, f"{tmp_path}/back/")
    assert (tmp_path / "back" / "config.json").read_bytes() == b"{}"
