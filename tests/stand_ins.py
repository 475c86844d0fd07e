"""Stand-ins: small networks written by hand that answer and are fed as those of large libraries are.

segmenter   depthwise convolutions; answers {"out": [B, K, H, W], "aux": ...}
pair        answers a tuple, of which the first is the logits; a part of it is frozen
detector    a list of images, a layer with weight norm; losses in training mode, a list of boxes else
turned      layers whose weight is [in, out], as GPT-2's are
text        a dataclass with `logits`, and with `loss` where labels are given; tied embeddings
recurrent   an LSTM
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, WORDS = 10, 11  # as many classes as the sweep draws


def separable(ins: int, outs: int) -> nn.Sequential:
    depthwise = nn.Conv2d(ins, ins, 3, padding=1, groups=ins, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(ins, outs, 1), nn.BatchNorm2d(outs), nn.ReLU6())


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(separable(3, 8), separable(8, 8))
        self.head, self.aux = nn.ConvTranspose2d(8, CLASSES, 3, padding=1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # [B, 3, H, W]
        x = self.backbone(x)
        return {"out": self.head(x), "aux": self.aux(x)}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, 5]
        x = F.gelu(self.body(F.gelu(self.stem(x))))
        return self.head(x), x


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(separable(3, 8), separable(8, 8))
        nn.utils.parametrizations.weight_norm(self.backbone[1][1])
        self.scores, self.boxes = nn.Linear(8, CLASSES), nn.Linear(8, 4)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        seen = torch.cat([self.backbone(image[None]).mean((2, 3)) for image in images])  # [B, 8]
        scores, boxes = self.scores(seen), self.boxes(seen)
        if self.training and targets is not None:
            wanted = torch.stack([target["labels"][0] for target in targets])
            corners = torch.stack([target["boxes"][0] for target in targets])
            return {"classes": F.cross_entropy(scores, wanted), "boxes": F.l1_loss(boxes, corners)}
        return [{"scores": s.sigmoid(), "boxes": b[None]} for s, b in zip(scores, boxes, strict=True)]


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out]."""

    def __init__(self, ins: int, outs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(ins, outs) * 0.1), nn.Parameter(torch.zeros(outs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(5, 24), Conv1D(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 5]
        return self.second(F.gelu(self.first(x)))


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(WORDS, 8), Conv1D(8, 8)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Answer:
        logits = self.head(torch.tanh(self.mix(self.embed(input_ids))))  # [B, T, K]
        if labels is None:
            return Answer(logits)
        return Answer(logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(5, 6, 2, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 5]
        return self.head(self.cells(x)[0][:, -1])
