"""LeNets: code tensors of 95 % sparse networks with 32 shared values a layer, as in the peers' results.

ramp   s(t) = 0.95 * (1 - (1 - t)^3), from 35 to 75 % of the steps       Zhu, Gupta 2017, section 3
one threshold for all layers, of |w| / std of the layer; the last layer keeps 30 % of its own
share  k-means of the remaining weights, then an epoch that trains the shared values
code   0 where pruned, else 1 + the index of the shared value            Han, Mao, Dally 2016
Both networks use one stream of random numbers, one after the other. Cost: minutes, on one thread.
"""

from __future__ import annotations

import numpy as np
import torch
from networks import NETWORKS, task
from torch import Tensor, nn
from torch.nn import functional as F

EPOCHS = {"lenet300": 14, "lenet5": 8}  # in the order in which they are trained
BATCH = 128
SPARSE, LAST = 0.95, 0.7  # shares of the weights that are pruned: of all, of the last layer at most
RAMP = (0.35, 0.75)  # from and to, as shares of the steps
EVERY = 50  # steps from one mask to the next
VALUES = 32
ROUNDS = 40  # of k-means
RATE, LEAST, SHARED_RATE = 2e-3, 1e-5, 1e-4


def codes() -> dict[str, dict[str, np.ndarray]]:
    """The code tensors of each network, uint8 in the weights' shapes."""
    x, y = task(batch=BATCH).train.dataset.tensors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums, and therefore trainings, depend on it
    torch.manual_seed(0)
    try:
        return {name: codes_of(NETWORKS[name](), epochs, x, y) for name, epochs in EPOCHS.items()}
    finally:
        torch.set_num_threads(threads)


def codes_of(net: nn.Module, epochs: int, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    prune(net, epochs, x, y)
    names = [name for name, p in net.named_parameters() if p.ndim > 1]
    indices, books = zip(*(shared(p.detach()) for p in weights(net)), strict=True)
    tune(net, indices, books, x, y)  # does not change the codes, but advances the random numbers
    return dict(zip(names, (index.numpy() for index in indices), strict=True))


def weights(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.ndim > 1]


def prune(net: nn.Module, epochs: int, x: Tensor, y: Tensor) -> None:
    """Train from scratch, and prune during the training."""
    steps = len(x) // BATCH
    total = epochs * steps
    begin, end = (int(total * share) for share in RAMP)
    optimizer = torch.optim.AdamW(net.parameters(), RATE)
    masks: list[Tensor] = []
    order = torch.empty(0)
    for step in range(total):
        if begin <= step <= end and step % EVERY == 0:
            masks = masks_at(weights(net), SPARSE * (1 - (1 - (step - begin) / (end - begin)) ** 3))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / total) + LEAST
        at = step % steps
        if at == 0:
            order = torch.randperm(len(x))
        batch = order[at * BATCH : (at + 1) * BATCH]
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, mask in zip(weights(net), masks, strict=False):
                p.mul_(mask)


def masks_at(ws: list[nn.Parameter], share: float) -> list[Tensor]:
    """The mask of each weight, bool, with `share` of all weights pruned."""
    scores = [(w.detach() / w.detach().std()).abs() for w in ws]
    limit = threshold(torch.cat([score.flatten() for score in scores]), share)
    last = ws[-1].detach().abs()
    return [*(score > limit for score in scores[:-1]), last > threshold(last, min(share, LAST))]


def threshold(scores: Tensor, share: float) -> Tensor:
    return scores.flatten().kthvalue(max(1, int(share * scores.numel()))).values


def shared(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of w) and the shared values [K], by Lloyd's rounds from even spacing."""
    kept = w[w != 0]
    count = min(VALUES, len(kept.unique()))
    book = torch.linspace(float(kept.min()), float(kept.max()), count)
    for _ in range(ROUNDS):
        nearest = (kept[:, None] - book).abs().argmin(1)
        members = torch.zeros(count).index_add_(0, nearest, torch.ones_like(kept))
        sums = torch.zeros(count).index_add_(0, nearest, kept)
        book = torch.where(members > 0, sums / members.clamp(min=1), book)
    index = torch.zeros(w.shape, dtype=torch.uint8)
    index[w != 0] = ((kept[:, None] - book).abs().argmin(1) + 1).to(torch.uint8)
    return index, book


def tune(
    net: nn.Module, indices: tuple[Tensor, ...], books: tuple[Tensor, ...], x: Tensor, y: Tensor
) -> None:
    """Train the shared values for an epoch; a value's gradient is the sum over its weights."""
    for book in books:
        book.requires_grad_()
    optimizer = torch.optim.Adam(books, SHARED_RATE)
    for _ in range(len(x) // BATCH):
        batch = torch.randint(len(x), (BATCH,))
        with torch.no_grad():
            for p, index, book in zip(weights(net), indices, books, strict=True):
                p.copy_(F.pad(book, (1, 0))[index.long()])
        net.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        for p, index, book in zip(weights(net), indices, books, strict=True):
            sums = torch.zeros(len(book) + 1).index_add_(0, index.long().flatten(), p.grad.flatten())
            book.grad = sums[1:]
        optimizer.step()
