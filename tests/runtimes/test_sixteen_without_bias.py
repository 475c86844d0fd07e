"""Layers without a bias between grids of 16 bits: ONNX Runtime leaves their weights as the file has them."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.run import run
from tersor.model.task import Task
from tersor.steps import Export, Quantize

onnxruntime = pytest.importorskip("onnxruntime")


def test_onnxruntime_puts_no_weight_on_a_grid_of_its_own(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(64, 16)
        inner = nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU()
        net = nn.Sequential(*inner, nn.Linear(32, 3)).eval()
    task = Task("x", evaluate=[(x, x[:, :3].argmax(1))], calibrate=[(x,)])
    state = run(net, [Quantize(activations=16)], task)
    run(state, [Export()], task, out=tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    wanted = state.model()(x).detach().numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
