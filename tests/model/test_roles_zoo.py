"""Roles: every parameter of twelve architectures agrees with lists by hand from their papers and code."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

from tersor.model.graph import traced
from tersor.model.roles import roles

IMAGE, IDS = torch.randn(1, 3, 224, 224), torch.arange(18).reshape(2, 9)
Told = tuple[str, int, int | None]
MATRIX, TURNED, CONV, TABLE = ("matrix", 0, 1), ("matrix", 1, 0), ("convolution", 0, 1), ("table", 0, 1)
SCALE, BIAS, POSITION, RECURRENT = (
    ("scale", 0, None), ("bias", 0, None), ("position", 0, None), ("recurrent", 0, 1),
)  # fmt: skip


def vision(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (getattr(pytest.importorskip("torchvision").models, name)(), (IMAGE,))


def timm(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (pytest.importorskip("timm").create_model(name, pretrained=False), (IMAGE,))


def text(kind: str, config: str, settings: dict[str, Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, Any]:
        transformers = pytest.importorskip("transformers")
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return getattr(transformers, kind)(getattr(transformers, config)(**settings, **ends)), inputs

    return make


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(10, 20)
        self.cell = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.embed(x))[0])


# name -> (factory, globs in order: the first that matches gives the role)
ZOO: dict[str, tuple[Callable[[], Any], dict[str, Told]]] = {
    "lstm": (
        lambda: (Words(), (IDS,)),
        {"*bias*": BIAS, "embed.weight": TABLE, "cell.weight*": RECURRENT, "head.weight": MATRIX},
    ),
    "resnet18": (
        vision("resnet18"),
        {"*bias": BIAS, "*bn?.weight": SCALE, "*downsample.1.weight": SCALE, "fc.weight": MATRIX,
         "*.weight": CONV},
    ),
    "mobilenet_v3_small": (
        vision("mobilenet_v3_small"),
        {"*bias": BIAS, "classifier*": MATRIX, "features.*.fc?.weight": CONV, "features.*.0.weight": CONV,
         "features.*.1.weight": SCALE},
    ),
    "swin_t": (
        vision("swin_t"),
        {"*relative_position_bias_table": POSITION, "*bias": BIAS, "*norm*.weight": SCALE,
         "features.0.0.weight": CONV, "features.0.2.weight": SCALE, "*.weight": MATRIX},
    ),
    "vit_b_32": (
        vision("vit_b_32"),
        {"class_token": POSITION, "encoder.pos_embedding": POSITION, "*bias": BIAS, "conv_proj.weight": CONV,
         "*.ln*.weight": SCALE, "*weight": MATRIX},
    ),
    "convnext_tiny": (
        vision("convnext_tiny"),
        {"*layer_scale": SCALE, "*bias": BIAS, "features.*.block.0.weight": CONV,
         "features.*.block.2.weight": SCALE, "features.*.block.?.weight": MATRIX, "features.0.0.weight": CONV,
         "features.[246].0.weight": SCALE,
         "features.[246].1.weight": CONV, "features.0.1.weight": SCALE, "classifier.0.weight": SCALE,
         "classifier.2.weight": MATRIX},
    ),
    "eva02_tiny": (
        timm("eva02_tiny_patch14_224"),
        {"cls_token": POSITION, "pos_embed": POSITION, "*bias": BIAS, "patch_embed.proj.weight": CONV,
         "*norm*.weight": SCALE, "*.weight": MATRIX},
    ),
    "xcit_nano": (
        timm("xcit_nano_12_p16_224"),
        {"cls_token": POSITION, "*gamma?": SCALE, "*temperature": SCALE, "*bias": BIAS,
         "patch_embed*0.weight": CONV, "patch_embed*1.weight": SCALE, "*local_mp.conv?.weight": CONV,
         "pos_embed.token_projection.weight": CONV,
         "*local_mp.bn.weight": SCALE, "*norm*.weight": SCALE, "*.weight": MATRIX},
    ),
    "gpt2": (
        text("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2},
             {"input_ids": IDS}),
        {"*wte.weight": TABLE, "*wpe.weight": POSITION, "*bias": BIAS, "*ln_*.weight": SCALE,
         "*.weight": TURNED},
    ),
    "llama": (
        text("LlamaForCausalLM", "LlamaConfig",
             {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2}, {"input_ids": IDS}),
        {"*embed_tokens.weight": TABLE, "*norm.weight": SCALE, "*.weight": MATRIX},
    ),
    "t5": (
        text("T5ForConditionalGeneration", "T5Config",
             {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
             {"input_ids": IDS, "decoder_input_ids": IDS}),
        {"shared.weight": TABLE, "*relative_attention_bias.weight": POSITION, "*layer_norm.weight": SCALE,
         "*.weight": MATRIX},
    ),
    "whisper": (
        text("WhisperForConditionalGeneration", "WhisperConfig",
             {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8,
              "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
              "decoder_ffn_dim": 24, "max_source_positions": 20, "max_target_positions": 16,
              "decoder_start_token_id": 1},
             {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": IDS}),
        {"*embed_positions.weight": POSITION, "*embed_tokens.weight": TABLE, "*bias": BIAS,
         "*conv?.weight": CONV, "*layer_norm.weight": SCALE, "*.weight": MATRIX},
    ),
    "bert": (
        text("BertForMaskedLM", "BertConfig",
             {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 24, "max_position_embeddings": 16},
             {"input_ids": IDS, "token_type_ids": IDS % 2}),
        {"*word_embeddings.weight": TABLE, "*position_embeddings.weight": POSITION,
         "*token_type_embeddings.weight": TABLE, "*bias": BIAS, "*LayerNorm.weight": SCALE,
         "*.weight": MATRIX},
    ),
}  # fmt: skip


@pytest.mark.extra
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_has_its_role(name: str) -> None:
    make, told = ZOO[name]
    model, inputs = make()
    found = roles(traced(model.eval(), inputs))
    names = [name for name, _ in model.named_parameters()]
    want = {one: next((role for glob, role in told.items() if fnmatchcase(one, glob)), None) for one in names}
    assert None not in want.values(), [one for one, role in want.items() if role is None]
    mine = {one: (found[one].word, found[one].axis, found[one].contracted) for one in names}
    unknown = [one for one, (word, _, _) in mine.items() if word == "unknown"]
    assert {one: mine[one] for one in names if one not in unknown and mine[one] != want[one]} == {}
    assert unknown == []
