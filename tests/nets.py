"""Networks for grids on edges: real architectures in few lines, and those whose edges are hard to name.

resnet20   He 2016 for one channel; parameter names of the benchmarked checkpoint
gpt        a Llama decoder (RMS norm, rotary positions, SwiGLU, tied head), answers in a dataclass
residual   += on a tensor that others hold, one module in two places, several calls
branch     adds noise and an auxiliary head only in training
nested     keyword arguments, a dict and a tuple of inputs, several outputs
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHECKPOINTS = Path(__file__).resolve().parents[2] / "shared" / "bench" / "models"


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or i != o:
            self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet20(nn.Module):
    def __init__(self, w: int = 16):
        super().__init__()

        def stage(i: int, o: int, stride: int) -> nn.Sequential:
            return nn.Sequential(Block(i, o, stride), Block(o, o, 1), Block(o, o, 1))

        self.conv1, self.bn1 = nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.layer1, self.layer2, self.layer3 = stage(w, w, 1), stage(w, 2 * w, 2), stage(2 * w, 4 * w, 2)
        self.fc = nn.Linear(4 * w, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, H, W]
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class RmsNorm(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class SelfAttention(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.v_proj, self.o_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D]

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat((-b, a), -1) * sin

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, d: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, inner, bias=False), nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, d: int, heads: int, inner: int):
        super().__init__()
        self.input_layernorm, self.self_attn = RmsNorm(d), SelfAttention(d, heads)
        self.post_attention_layernorm, self.mlp = RmsNorm(d), Mlp(d, inner)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, words: int, d: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(words, d)
        self.layers = nn.ModuleList(Layer(d, heads, inner) for _ in range(layers))
        self.norm = RmsNorm(d)
        half = torch.arange(0, d // heads, 2) / (d // heads)
        self.register_buffer("frequency", 10000.0**-half, persistent=False)
        self.again: Callable[[], Any] | None = None  # checkpoint's context_fn, and whether it is used
        self.thrifty = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        angle = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.frequency  # [T, D / 2]
        cos, sin = torch.cat((angle, angle), 1).cos(), torch.cat((angle, angle), 1).sin()
        for layer in self.layers:
            if self.thrifty and self.training:
                more = {} if self.again is None else {"context_fn": self.again}
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, **more)
            else:
                x = layer(x, cos, sin)
        return self.norm(x)


@dataclass
class Answer:
    """As Hugging Face models answer."""

    logits: Tensor
    loss: Tensor | None = None


class Gpt(nn.Module):
    def __init__(self, words: int = 50, d: int = 16, heads: int = 2, inner: int = 24, layers: int = 2):
        super().__init__()
        self.model = Decoder(words, d, heads, inner, layers)
        self.lm_head = nn.Linear(d, words, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Answer:
        logits = self.lm_head(self.model(input_ids))
        if labels is None:
            return Answer(logits)
        return Answer(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


torch.export.register_dataclass(Answer)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.twice = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6())
        self.alias = self.twice[0]
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, 6, 6]
        x = self.stem(x)
        for _ in range(2):
            y = self.twice(x)
            y += x
            x = y.relu_()
        x = 1 / (1 + self.alias(x).abs())
        x, _ = self.pool(x)
        return self.head(F.normalize(x.mean((2, 3))) - 1)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.aux = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:  # [B, 5]
        y = F.relu(self.first(x))
        if self.training:
            y = y + 0.01 * torch.randn_like(y)
            return self.second(y) + x, self.aux(y)
        return self.second(y) + x


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self, pair: tuple[Tensor, Tensor], *, extra: dict[str, Tensor], scale: float = 0.5
    ) -> dict[str, Any]:
        x = self.a(pair[0]) + pair[1] * scale
        return {"sum": x + extra["bias"], "both": (x, self.b(x).tanh())}


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def nets(seed: int = 0) -> dict[str, Call]:
    """(model in eval mode, args, kwargs) by name, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        x, v, ids = torch.randn(3, 1, 8, 8), torch.randn(4, 5), torch.randint(0, 50, (2, 7))
        pair, bias = (torch.randn(2, 4), torch.randn(2, 4)), torch.randn(4)
        found: dict[str, Call] = {
            "resnet20": (ResNet20(4), (x,), {}),
            "gpt": (Gpt(), (), {"input_ids": ids}),
            "residual": (Residual(), (x[..., :6, :6],), {}),
            "branch": (Branch(), (v,), {}),
            "nested": (Nested(), (pair,), {"extra": {"bias": bias}}),
        }
    return {name: (model.eval(), args, kwargs) for name, (model, args, kwargs) in found.items()}


def benched(name: str) -> Call:
    """A trained network of the benchmarks and inputs for it: "resnet20" or "tinygpt"."""
    from safetensors.torch import load_file

    path = CHECKPOINTS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the checkout, in shared/bench/models: {name} is left out")
    model: nn.Module = ResNet20() if name == "resnet20" else Gpt(2048, 256, 4, 768, 4)
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()
    }
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    generator = torch.Generator().manual_seed(0)
    if name == "resnet20":
        return model.eval(), (torch.randn(8, 1, 28, 28, generator=generator),), {}
    return model.eval(), (), {"input_ids": torch.randint(0, 2048, (2, 24), generator=generator)}


def floats(output: Any) -> list[Tensor]:
    """The floating tensors of an answer, whatever it is wrapped in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Answer):
        return floats([output.logits, output.loss])
    if isinstance(output, dict):
        return floats(list(output.values()))
    return [t for item in output for t in floats(item)] if isinstance(output, (tuple, list)) else []
