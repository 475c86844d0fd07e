"""Order, on every classifier of torchvision: its answers stay, or its units do."""

import pytest
import torch
from permuted import difference, randomized

from tersor.model import channel_order
from tersor.model.channel_order import links

pytestmark = [pytest.mark.long, pytest.mark.extra]
models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
SIZES = (32, 64, 96, 224, 518)  # pixels; the first that an architecture takes
OLD = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}  # or seconds of it


@torch.no_grad()
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_answers_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The true order of 4,096 units takes a minute; any other that moves all of them shows as much.
    monkeypatch.setattr(channel_order, "order", lambda rows, columns: torch.arange(len(rows)).flip(0))
    model = models.get_model(name, weights=None, **OLD.get(name, {})).eval()
    for size in SIZES:
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            model(x)
            break
        except (RuntimeError, AssertionError):
            continue
    if links(model, (x,)):
        x = x.double()  # where rounding is no excuse
        moved, _ = difference(randomized(model.double(), x), (x,))
        assert moved <= 1e-5
