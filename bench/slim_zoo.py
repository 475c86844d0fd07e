"""Slim zoo: the 78 models of bench/slim_coverage.py and integers_coverage.py, in published sizes.

CASES: name -> Case(family, make, example)      make() is an untrained model, example() the tensor it takes
torchvision    24 classifiers       segmentation   3, detection   2 without the choice of boxes
timm           40 classifiers       transformers   6 tiny ones, most as bare encoders       recurrent   3
Every model takes one tensor and returns a tensor or a tuple of them. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo import TIMM, TORCHVISION, Recurrent

SIDE = 224  # pixels, for most
SIDES = {"inception_v3": 299, "swin_v2_t": 256, "crossvit_tiny_240": 240, "botnet26t_256": 256}
WORDS, LENGTH, WIDTH = 100, 16, 64
MELS, FRAMES = 16, 64  # of the speech model
NORMS = 3  # batches that calibrate batch norms
Make = Callable[[], nn.Module]
Example = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One model, and what it takes."""

    family: str
    make: Make
    example: Example


def with_norms(model: nn.Module, example: Tensor) -> None:
    """Calibrate the batch norms of an untrained model in place, or its activations would grow or vanish.
    `example`: a batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of all batches
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for _ in range(NORMS):
            model(torch.randn_like(example) if example.is_floating_point() else example)
    model.eval()


def image(name: str = "", side: int = SIDE) -> Example:
    return lambda: torch.randn(1, 3, SIDES.get(name, side), SIDES.get(name, side))


def text() -> Tensor:
    return torch.randint(WORDS, (1, LENGTH))


class Segmenter(nn.Module):
    """The maps of a segmenter, the auxiliary ones too, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(images).values())


class Detector(nn.Module):
    """What the heads of a detector say about each anchor: without resizing and the choice of boxes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.head(list(self.backbone(images).values())).values())


class First(nn.Module):
    """The first output of a model of transformers: hidden states, or logits."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs, **self.settings)[0]


def torchvision_model(name: str) -> Make:
    def make() -> nn.Module:
        from torchvision.models import get_model

        more = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
        return get_model(name, weights=None, **more)

    return make


def part_of(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Make:
    """A segmenter or a detector."""

    def make() -> nn.Module:
        from torchvision.models import get_model

        return wrap(get_model(name, weights=None, weights_backbone=None))

    return make


def timm_model(name: str) -> Make:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return make


BERT = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 32,
}  # fmt: skip
WHISPER = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
# Name -> (class, configuration, its settings, settings of the call, example).
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], Example]] = {
    "bert": ("BertModel", "BertConfig", BERT, {}, text),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32},
        {"use_cache": False}, text,
    ),
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", {**BERT, "num_attention_heads": 8, "num_key_value_heads": 4},
        {"use_cache": False}, text,
    ),
    "t5enc": (
        "T5EncoderModel", "T5Config",
        {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        {}, text,
    ),
    "vit": (
        "ViTModel", "ViTConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
         "image_size": 32, "patch_size": 8}, {}, image(side=32),
    ),
    "whisper": ("WhisperEncoder", "WhisperConfig", WHISPER, {}, lambda: torch.randn(1, MELS, FRAMES)),
}  # fmt: skip


def transformers_model(name: str) -> Make:
    def make() -> nn.Module:
        import transformers
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        transformers.logging.set_verbosity_error()
        kind, config, settings, call, _ = TRANSFORMERS[name]
        made = WhisperEncoder if name == "whisper" else getattr(transformers, kind)
        return First(made(getattr(transformers, config)(**settings)), **call)

    return make


CLASSIFIERS = [*TORCHVISION.split()]
CLASSIFIERS.insert(CLASSIFIERS.index("resnet18") + 1, "resnet50")
SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")
DETECTORS = {"ssdlite320_mobilenet_v3_large": 320, "fcos_resnet50_fpn": 256}  # name -> side of the image
RECURRENT: dict[str, Make] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "bilstm": lambda: Recurrent(nn.LSTM, True),
    "gru": lambda: Recurrent(nn.GRU),
}

CASES: dict[str, Case] = {
    **{f"torchvision/{n}": Case("torchvision", torchvision_model(n), image(n)) for n in CLASSIFIERS},
    **{f"torchvision/{n}": Case("segmentation", part_of(n, Segmenter), image()) for n in SEGMENTERS},
    **{
        f"torchvision/{n}": Case("detection", part_of(n, Detector), image(side=s))
        for n, s in DETECTORS.items()
    },
    **{f"timm/{n}": Case("timm", timm_model(n), image(n)) for n in TIMM.split()},
    **{
        f"transformers/{n}": Case("transformers", transformers_model(n), t[4])
        for n, t in TRANSFORMERS.items()
    },
    **{f"recurrent/{n}": Case("recurrent", make, text) for n, make in RECURRENT.items()},
}
