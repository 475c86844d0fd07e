"""Files that take inputs of any size along named axes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from integer_nets import made
from torch import Tensor, nn

from tersor.core.run import run
from tersor.errors import RefusedError, SettingError
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.runtimes.dynamic import axes_of, resized
from tersor.steps import Export, Fold, Quantize


class Encoder(nn.Module):
    """Tokens and their mask [B, T] to one vector each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.layer(self.embed(tokens)) * mask[..., None]
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


def encoder() -> tuple[nn.Module, Task, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    tokens, mask = torch.randint(30, (16, 6)), torch.ones(16, 6)
    loader = TensorBatches(tokens, mask, torch.zeros(16, dtype=torch.int64), batch=8)
    task = Task(evaluate=loader, calibrate=loader, example=(tokens[:3], mask[:3]))
    return Encoder().eval(), task, (tokens, mask)


@pytest.mark.wide
@pytest.mark.parametrize("integers", [False, True])
def test_tokens_of_any_number(tmp_path: Path, integers: bool) -> None:
    net, task, _ = encoder()
    state = run(net, [Quantize(activations=8)] if integers else [Fold()], task)
    run(state, [Export(dynamic_axes="1")], task, out=tmp_path)
    session, model = onnxruntime.open(tmp_path / "model.onnx"), state.model()
    for batch, tokens in ((1, 3), (4, 6), (2, 17)):
        x, mask = torch.randint(30, (batch, tokens)), torch.ones(batch, tokens)
        ours, theirs = model(x, mask).detach().numpy(), session.run(x, mask)[0]
        assert np.abs(ours - theirs).max() < (0.05 if integers else 1e-5)


def test_images_of_any_height_and_width(tmp_path: Path) -> None:
    net, task = made("residual")
    state = run(net, [Quantize(activations=8)], task)
    run(state, [Export(dynamic_axes="2,3")], task, out=tmp_path)
    session, model = onnxruntime.open(tmp_path / "model.onnx"), state.model()
    for height, width in ((16, 16), (12, 20), (33, 9)):
        x = torch.randn(2, 3, height, width)
        assert np.abs(model(x).detach().numpy() - session.run(x)[0]).max() < 0.3


@pytest.mark.wide
def test_a_model_of_one_size_is_refused(tmp_path: Path) -> None:
    net, task = made("branches")  # a linear layer over all positions
    with pytest.raises(RefusedError, match="Branches runs with no other size along 2, 3"):
        run(net, [Export(dynamic_axes="2,3")], task, out=tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


def test_a_size_that_the_code_fixes_is_found(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.shape[1]) if x.shape[1] == 4 else x + 1.0

    with pytest.raises(RefusedError):
        onnxruntime.write(Fixed(), (torch.randn(2, 4),), tmp_path / "m.onnx", dynamic_axes=(1,))


@pytest.mark.parametrize("text", ["0", "a", "1,1", "-1", "1;2", "1.5"])
def test_other_words_than_axes_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="axes from 1 on"):
        Export(dynamic_axes=text)
    assert axes_of(" 2, 3", "export") == (2, 3)
    assert axes_of("", "export") == ()


def test_an_axis_that_no_input_has(tmp_path: Path) -> None:
    net, task = made("residual")
    with pytest.raises(SettingError, match="no input has an axis 5"):
        run(net, [Export(dynamic_axes="5")], task, out=tmp_path)


def test_resized_repeats_or_takes_a_part() -> None:
    x, other = torch.arange(12.0).reshape(2, 6), torch.zeros(2, 5)
    longer, same = resized((x, other), (1,), 2, 1)
    assert torch.equal(longer, torch.cat([x, x], 1))
    assert same is other
    assert torch.equal(resized((x,), (1,), 1, 2)[0], x[:, :3])
