"""How much the outputs of a model change when its hidden units are sorted: only by rounding."""

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.forms import Dense
from tersor.model.channel_order import arranged, links


def randomized(model: nn.Module, x: Tensor) -> nn.Module:
    """Randomize weights, norms and statistics: all units differ, and activations stay in a normal range."""
    random = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random).to(like.dtype)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(drawn(p) * (math.sqrt(2 / max(p[0].numel(), 1)) if p.ndim > 1 else 0.3))
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1:
                weight.add_(1)
        for norm in norms:  # the statistics of one forward
            norm.momentum = 1.0
            norm.train()
        model(x)
        for norm in norms:
            norm.eval()
            norm.running_mean += 0.3 * drawn(norm.running_mean) * norm.running_var.sqrt()
            norm.running_var.clamp_(min=1e-3).mul_(0.5 + drawn(norm.running_var).sigmoid())
    return model.eval()


@torch.no_grad()
def difference(model: nn.Module, inputs: tuple) -> tuple[float, int]:
    """Sort hidden units: (largest difference of the outputs over the largest output, links)."""
    before = [out.clone() for out in tree_leaves(model(*inputs))]
    found = links(model, inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    new = arranged({name: Dense(value) for name, value in state.items()}, found)
    assert bool(new) == bool(found), "the order did not change, so the test shows nothing"
    for name, tensor in model.state_dict().items():
        tensor.copy_(new[name].decode() if name in new else state[name])
    pairs = list(zip(before, tree_leaves(model(*inputs)), strict=True))
    return max(float((after - was).abs().max() / was.abs().max()) for was, after in pairs), len(found)
