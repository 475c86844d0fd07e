"""torch's transformer encoders with padding: their fast path computes on nested tensors, not by parts."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.model.batches import evaluating
from tersor.model.fast_path import no_fast_path
from tersor.model.task import Task
from tersor.steps import Distill, Export, Factorize, Prune, Quantize, Slim


class Padded(nn.Module):
    def __init__(self, nested: bool = True):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.body(self.table(ids), src_key_padding_mask=mask)
        return self.head((x * ~mask[..., None]).sum(1) / (~mask).sum(1, keepdim=True))


def net(nested: bool = True) -> Padded:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Padded(nested).eval()


def task() -> Task:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (16, 12), generator=rng)
    mask = torch.arange(12)[None] >= torch.randint(4, 13, (16, 1), generator=rng)
    batch = [(ids, mask, torch.randint(3, (16,), generator=rng))]
    return Task("padded", evaluate=batch, calibrate=batch, train=batch)


STEPS = {
    "prune": Prune(keep=0.5),
    "int8": Quantize(activations=8),
    "gptq": Quantize(bits=4, rounding="gptq"),
    "brecq": Quantize(bits=4, rounding="brecq"),
    "layers": Factorize(keep=0.5, layers=True),
    "slim": Slim(keep=0.7, unmet="nearest"),
    "distill": Distill(epochs=1, features="body.layers.0"),
}


@pytest.mark.parametrize("word", STEPS)
def test_steps_see_what_is_inside_of_padded_encoders(word: str) -> None:
    """As they do where the encoder itself uses no nested tensors. The result runs by itself, too."""
    on, step = task(), STEPS[word]
    found, wanted = (run(net(nested), step, on).model().eval() for nested in (True, False))
    for (name, a), b in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    ids, mask, _ = next(iter(on.batches("evaluate")))
    with torch.no_grad():
        torch.testing.assert_close(found(ids, mask), wanted(ids, mask), rtol=1e-4, atol=1e-5)


def test_the_file_computes_what_is_simulated(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    on = task()
    result = run(net(), [Quantize(activations=8), Export()], on, out=tmp_path)
    ids, mask, _ = next(iter(on.batches("evaluate")))
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = dict(zip([item.name for item in session.get_inputs()], (ids.numpy(), mask.numpy()), strict=True))
    (found,) = session.run(None, feeds)
    with torch.no_grad():
        simulated, exact = result.model().eval()(ids, mask), net()(ids, mask)
    off = (simulated - exact).norm()
    assert 0 < off < 0.1 * exact.norm()
    assert np.linalg.norm(found - simulated.numpy()) < 0.5 * float(off)


def test_scores_are_those_of_the_parts() -> None:
    """Also of a model that looks at padded positions, where the fast path gives zeros."""
    ids, mask, label = next(iter(task().batches("evaluate")))
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()
    x = torch.randn(16, 12, 32)
    on = Task(
        "own", evaluate=[(x, mask, label)],
        feed=lambda f, batch: f(batch[0], src_key_padding_mask=batch[1]),
        target=lambda batch: batch[2], metric=lambda y, _: y.square().mean((1, 2)),
    )  # fmt: skip
    slow = copy.deepcopy(model)
    slow.use_nested_tensor = False
    slow.layers[0].activation_relu_or_gelu = 0  # what the layer checks before it uses its kernel
    with torch.no_grad():
        wanted = slow(x, src_key_padding_mask=mask).square().mean((1, 2))
        assert not torch.allclose(model(x, src_key_padding_mask=mask).square().mean((1, 2)), wanted)
    torch.testing.assert_close(on.scores(model), wanted)


def test_the_setting_of_the_process_comes_back() -> None:
    mha = torch.backends.mha
    assert mha.get_fastpath_enabled()
    with evaluating(net()):
        assert not mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), no_fast_path():
        _ = 1 / 0
    assert mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with no_fast_path():
            pass
        assert not mha.get_fastpath_enabled()
    finally:
        mha.set_fastpath_enabled(True)


def test_overlapping_runs_turn_it_on_with_the_last() -> None:
    """As those of threads do: the first to enter is the first to leave."""
    mha, first, second = torch.backends.mha, no_fast_path(), no_fast_path()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert mha.get_fastpath_enabled()
