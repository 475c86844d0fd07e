"""Zoo: the models of the sweep (bench/architectures.py), each with a task and tiny batches.

CASES: name -> Case(family, make, task, distill)     make() is an untrained model, task() two batches of two
torchvision     the smallest member of each family of classifiers, 3 segmenters, 3 detectors
timm            the smallest member of 40 common families that torchvision lacks
transformers    text, images and speech, in tiny configurations
recurrent       LSTM, bidirectional too, and GRU
Nothing is downloaded: weights are random. Images have 64 pixels a side if the model takes such small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.task import Task

BATCHES, BATCH = 2, 2
SIDE, CLASSES = 64, 10  # pixels of an image, labels of all tasks
WORDS, LENGTH = 100, 12  # of the texts
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """One model of the sweep."""

    family: str
    make: Make
    task: Callable[[], Task]
    distill: Mapping[str, Any] = field(default_factory=dict)  # settings of the step, if not the defaults


def case(name: str, cases: Mapping[str, Case] | None = None) -> Case:
    return (CASES if cases is None else cases)[name]


def task_of(draw: Callable[[], Any], **settings: Any) -> Task:
    """A task with two batches from `draw`, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        batches = [draw() for _ in range(BATCHES)]
    return Task("sweep", evaluate=batches, train=batches, **settings)


# Images


def images(side: int) -> Tensor:
    return torch.randn(BATCH, 3, side, side)


def labels(*shape: int, most: int = CLASSES) -> Tensor:
    return torch.randint(most, shape)


def classify(side: int) -> Task:
    """Batches with only labels: the loss and the metric are the task's defaults."""
    return task_of(lambda: (images(side), labels(BATCH)))


def segment(side: int) -> Task:
    """A label for each pixel; the model answers {"out": [B, K, H, W]}."""
    return task_of(
        lambda: (images(side), labels(BATCH, side, side)),
        logits=lambda output: output["out"],
        metric="mean_iou",
    )


def detect(side: int) -> Task:
    """Boxes with labels. The model computes its losses itself from the targets, in training mode."""

    def draw() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        corners = torch.rand(BATCH, 3, 2) * side / 2
        boxes = torch.cat((corners, corners + side / 4), 2)
        return list(images(side)), [{"boxes": b, "labels": labels(3, most=CLASSES - 1) + 1} for b in boxes]

    return task_of(draw, feed=look, loss=detection_loss, metric=best_scores)


def look(model: nn.Module, batch: Any) -> Any:
    pictures, targets = batch
    return model(pictures, targets) if model.training else model(pictures)


def detection_loss(output: dict[str, Tensor], _: Any) -> Tensor:
    return torch.stack(list(output.values())).sum()


def best_scores(output: list[dict[str, Tensor]], _: Any) -> Tensor:
    return torch.stack([found["scores"].amax() for found in output])  # [B]


def torchvision_model(name: str, **settings: Any) -> Make:
    def make() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, **{"num_classes": CLASSES, **settings})

    return make


def segmenter(name: str) -> Make:
    return torchvision_model(name, weights_backbone=None)


def detector(name: str, side: int, **settings: Any) -> Make:
    """All boxes count, also those with a low score, since the model is untrained."""
    size = {} if name.startswith("ssd") else {"min_size": side, "max_size": side}
    return torchvision_model(name, weights_backbone=None, **size, **settings)


def timm_model(name: str, **settings: Any) -> Make:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)

    return make


# Text and speech: the models compute the loss from labels in the batch.


def words(count: int) -> Tensor:
    return labels(BATCH, count, most=WORDS)


def continue_text() -> Task:
    def draw() -> dict[str, Tensor]:
        ids = words(LENGTH)
        return {"input_ids": ids, "labels": ids}

    return task_of(draw, metric="perplexity")


def fill_in() -> Task:
    return task_of(lambda: {"input_ids": words(LENGTH), "labels": words(LENGTH)})


def translate() -> Task:
    return task_of(lambda: {"input_ids": words(LENGTH), "labels": words(5)}, metric="token_accuracy")


def embed_text() -> Task:
    """The mean of the last hidden states, drawn towards random directions."""

    def embed(model: nn.Module, batch: Any) -> Tensor:
        return F.normalize(model(input_ids=batch["input_ids"]).last_hidden_state.mean(1), dim=1)

    return task_of(
        lambda: {"input_ids": words(LENGTH), "wanted": torch.randn(BATCH, WIDTH)},
        feed=embed,
        target=lambda batch: batch["wanted"],
        loss=lambda output, target: 1 - F.cosine_similarity(output, target).mean(),
        logits="embedding",
        metric=F.cosine_similarity,
    )


def classify_pixels(side: int) -> Task:
    return task_of(lambda: {"pixel_values": images(side), "labels": labels(BATCH)})


def write_speech() -> Task:
    """Whisper: a spectrogram, and the spoken tokens."""
    return task_of(lambda: {"input_features": torch.randn(BATCH, MELS, FRAMES), "labels": words(5)})


def align_speech() -> Task:
    """wav2vec2 with CTC: a wave, and the spoken letters, which are fewer than the outputs."""
    return task_of(
        lambda: {"input_values": torch.randn(BATCH, 2000), "labels": labels(BATCH, 5, most=WORDS - 1) + 1},
        metric=lambda output, target: output.logits.argmax(-1).eq(target[:, :1]).float().mean(1),
    )


WIDTH, MELS, FRAMES = 64, 16, 64
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BERT = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128,
}  # fmt: skip
# Name -> (class, its configuration's class, settings, task).
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], Callable[[], Task]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", {**BERT, "max_position_embeddings": 32}, fill_in),
    "bert_embedding": ("BertModel", "BertConfig", {**BERT, "max_position_embeddings": 32}, embed_text),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32}, continue_text,
    ),
    "llama": (
        "LlamaForCausalLM", "LlamaConfig",
        {**BERT, "num_key_value_heads": 2, "max_position_embeddings": 32}, continue_text,
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0}, translate,
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
         "image_size": 32, "patch_size": 8, "num_labels": CLASSES}, lambda: classify_pixels(32),
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2, "encoder_attention_heads": 4,
         "encoder_ffn_dim": 128, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128,
         "num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 16, **SPECIAL},
        write_speech,
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {**BERT, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
         "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
         "mask_time_length": 2, "ctc_zero_infinity": True}, align_speech,
    ),
}  # fmt: skip


def transformers_model(name: str) -> Make:
    def make() -> nn.Module:
        import transformers

        kind, config, settings, _ = TRANSFORMERS[name]
        transformers.logging.set_verbosity_error()
        return getattr(transformers, kind)(getattr(transformers, config)(**settings))

    return make


class Recurrent(nn.Module):
    """Tokens, a recurrent network of two layers, and a label from its last output."""

    def __init__(self, kind: type[nn.RNNBase], both_ways: bool = False):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.cells = kind(32, 48, 2, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(96 if both_ways else 48, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T]
        return self.head(self.cells(self.embed(tokens))[0][:, -1])


def classify_text() -> Task:
    return task_of(lambda: (labels(BATCH, LENGTH, most=WORDS), labels(BATCH)))


# The tables


def classifiers(
    family: str, model: Callable[..., Make], names: Iterable[str], special: Mapping[str, dict[str, Any]]
) -> dict[str, Case]:
    """Cases of classifiers. `special`: settings of some, and the "side" of their images if not 64."""
    found = {}
    for name in names:
        settings = dict(special.get(name, {}))
        side = settings.pop("side", SIDE)
        found[name] = Case(family, model(name, **settings), lambda side=side: classify(side))
    return found


TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d wide_resnet50_2
shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32
"""
TIMM = """
botnet26t_256 coat_lite_tiny convmixer_768_32 convnextv2_atto crossvit_tiny_240 cspresnet50
deit_tiny_patch16_224 dla34 dpn48b edgenext_xx_small efficientformer_l1 efficientvit_b0 ese_vovnet19b_dw
eva02_tiny_patch14_224 fastvit_t8 gcvit_xxtiny ghostnet_100 hiera_tiny_224 hrnet_w18_small levit_128s
mambaout_femto mixer_s32_224 mobilenetv4_conv_small mobilevit_xxs mvitv2_tiny nf_regnet_b0 poolformer_s12
pvt_v2_b0 repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnetv2_50 rexnet_100 selecsls42 skresnet18
starnet_s1 twins_pcpvt_small xception41 xcit_nano_12_p16_224
"""
SIZED = """
coat_lite_tiny deit_tiny_patch16_224 eva02_tiny_patch14_224 gcvit_xxtiny hiera_tiny_224 levit_128s
mixer_s32_224 mvitv2_tiny twins_pcpvt_small xcit_nano_12_p16_224 botnet26t_256 mobilevit_xxs
"""  # models of timm that take the side of their images as a setting
SPECIAL_TORCHVISION: dict[str, dict[str, Any]] = {
    "inception_v3": {"side": 299, "init_weights": False, "aux_logits": True},
    "googlenet": {"init_weights": False, "aux_logits": True},
    "maxvit_t": {"side": 224},
    "vit_b_32": {"image_size": SIDE},
}
SPECIAL_TIMM: dict[str, dict[str, Any]] = {
    **{name: {"img_size": SIDE} for name in SIZED.split()},
    "efficientformer_l1": {"side": 224},
}
SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")
# Name -> (side of the images, settings, the layer that is distilled: losses and boxes are no logits).
DETECTORS: dict[str, tuple[int, dict[str, Any], str]] = {
    "ssdlite320_mobilenet_v3_large": (320, {"score_thresh": 0.0}, "backbone.features.1"),
    "fcos_resnet50_fpn": (128, {"score_thresh": 0.0}, "backbone.fpn.layer_blocks.0"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (128, {"box_score_thresh": 0.0}, "backbone.fpn.layer_blocks.0"),
}

CASES: dict[str, Case] = {
    **classifiers("torchvision", torchvision_model, TORCHVISION.split(), SPECIAL_TORCHVISION),
    **{name: Case("torchvision", segmenter(name), lambda: segment(SIDE)) for name in SEGMENTERS},
    **{
        name: Case(
            "torchvision", detector(name, side, **settings), lambda side=side: detect(side),
            {"teacher_weight": 0.0, "features": layer},
        )
        for name, (side, settings, layer) in DETECTORS.items()
    },
    **classifiers("timm", timm_model, TIMM.split(), SPECIAL_TIMM),
    **{name: Case("transformers", transformers_model(name), t[3]) for name, t in TRANSFORMERS.items()},
    "lstm": Case("recurrent", lambda: Recurrent(nn.LSTM), classify_text),
    "lstm_both_ways": Case("recurrent", lambda: Recurrent(nn.LSTM, True), classify_text),
    "gru": Case("recurrent", lambda: Recurrent(nn.GRU), classify_text),
}  # fmt: skip
