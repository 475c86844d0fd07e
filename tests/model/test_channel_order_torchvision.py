"""Channel order on every classifier of torchvision: the outputs do not change, or no unit is permuted."""

import pytest
import torch
from permuted import difference, randomized

from tersor.model import channel_order
from tersor.model.channel_order import links

pytestmark = [pytest.mark.long, pytest.mark.extra]
models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
SIZES = (32, 64, 96, 224, 518)  # pixels; the first that an architecture accepts is used
# Skip an initialization that takes seconds.
OLD = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


@torch.no_grad()
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_outputs_do_not_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real order of 4,096 units takes a minute; any other order that moves all units tests as much.
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
        x = x.double()  # so that rounding is negligible
        moved, _ = difference(randomized(model.double(), x), (x,))
        assert moved <= 1e-5
