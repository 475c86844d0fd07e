"""Slim MiniLM: a quarter of the heads and neurons of a sentence encoder removed, and tuned without labels.

python bench/slim_minilm.py [--peers PYTHON] [--record]
python bench/slim_minilm.py --make [INDEX]     writes train.txt beside calib.txt and heldout.txt
Each layer keeps 9 of 12 heads and 1,140 of 1,536 neurons; the residual stream stays, since LayerNorm counts
its channels. Then it is tuned towards the given model's outputs, on sentences of package descriptions and
verses (bench/minilm.py), none of them held out. cosine = to the given model's embeddings of 500 held-out
sentences.
Times are of one .onnx file each, ids [B, T] to embeddings, in ONNX Runtime and OpenVINO, float32, one thread,
in turns: medians of the rounds' ratios. PYTHON is an interpreter with both runtimes, by default
TERSOR_SLIM_PEERS or this one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import job
import minilm
import numpy as np
import torch
from child import replies
from networks import parameters
from slim_latency import RUNTIMES, same
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.errors import MissingError, TersorError
from tersor.measure.latency import interleave, ratio
from tersor.model.logits import Logits
from tersor.model.task import Task
from tersor.steps import Distill, Slim

CALIBRATE, TRAIN = 1024, 16384  # sentences
CALIBRATION_BATCH = 128  # slim refits on 8 batches at most
CUT: dict[str, Any] = {"keep": 0.75, "of": "units", "per": "family"}
TUNING: dict[str, Any] = {
    "epochs": 1,
    "lr": 3e-4,
    "schedule": "onecycle",
    "teacher_weight": 1.0,
    "bf16": True,
}
COSINE, SECONDS, RATIO = ">= 0.97", "<= 600", "<= 0.8"
BATCH, TOKENS = 16, 32  # of tuning; of a timed sentence: held-out ones have 28 on average
BATCHES, ROUNDS, BURST = (1, 16), 40, 20.0  # timed; ms of a file in one round
LIMIT = 600  # seconds of the timing
SPREAD = 20  # the embeddings' numbers are small, 1 / 20 on average: their mean square is near 1 at this scale


def ordered(texts: list[str], size: int) -> list[dict[str, Tensor]]:
    """Batches of sentences of like lengths, in a random order: less padding."""
    found = minilm.batches(sorted(texts, key=len), size)
    random.Random(0).shuffle(found)
    return found


class Shuffled:
    """The batches in a new order in each pass."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batches[at] for at in torch.randperm(len(self.batches)).tolist())


def given() -> nn.Module:
    """The encoder without dropout: a student that drops a tenth of its numbers cannot match the teacher's."""
    net = minilm.load()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def task(net: nn.Module) -> Task:
    return replace(
        minilm.task(net, BATCH),
        calibrate=ordered(minilm.sentences("calib")[:CALIBRATE], CALIBRATION_BATCH),
        train=Shuffled(ordered(training()[:TRAIN], BATCH)),
        logits=lambda output: Logits(SPREAD * output, "embedding"),
    )


def training() -> list[str]:
    try:
        return minilm.sentences("train")
    except MissingError:
        raise MissingError(
            "bench: no sentences to tune MiniLM. Make calib.txt and heldout.txt with python bench/minilm.py "
            "FOLDER, name the folder in TERSOR_SENTENCES, and make train.txt with python "
            "bench/slim_minilm.py --make."
        ) from None


def make(index: str | None = None) -> None:
    """Write train.txt: calib.txt and all other sentences, without those that begin as a held-out one does."""
    calibration, held = minilm.sentences("calib"), minilm.sentences("heldout")
    known = {start(text) for text in (*calibration, *held)}
    verses = [verse for verse in minilm.bible() if 8 <= len(verse.split()) <= 60]
    more = [
        text
        for text in (*minilm.unique(minilm.descriptions(index)), *minilm.unique(iter(verses)))
        if start(text) not in known
    ]
    random.Random(1).shuffle(more)
    path = Path(os.environ["TERSOR_SENTENCES"]).expanduser() / "train.txt"
    path.write_text("\n".join([*calibration, *more]) + "\n")


def start(text: str) -> str:
    return " ".join(text.split()[:6]).lower()


def measure(name: str, peers: str) -> Iterator[Row]:
    net = given()
    on = task(net)
    began = time.process_time()
    cut = run(net, [Slim(**CUT)], on)
    between = time.process_time()
    slim = run(cut, [Distill(**TUNING)], on).model().eval()
    ended = time.process_time()
    for word, model, target in (("corrected", cut.model(), ""), ("tuned", slim, COSINE)):
        scores = on.scores(model)
        note = f"lowest of {len(scores)} {float(scores.min()):.3f}"
        yield row(name, f"{word}, mean cosine", float(scores.mean()), "", target, note=note)
    yield row(name, "processor time of the cut", round(between - began), "s")
    yield row(name, "processor time of tuning", round(ended - between), "s", SECONDS)
    note = f"{parameters(net)} to {parameters(slim)}, embeddings of words included"
    yield row(name, "parameters kept", 100 * parameters(slim) / parameters(net), "%", note=note)
    yield from latency(name, {"given": net, "slim": slim}, peers)


# Latency


class Encoder(nn.Module):
    """Token numbers to embeddings, in one file: 0 is padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long()
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return minilm.embed(self.model, batch)


def latency(name: str, models: dict[str, nn.Module], peers: str) -> Iterator[Row]:
    from tersor.runtimes import onnxruntime

    ids = minilm.batches(minilm.sentences("heldout")[:100], 100)[0]["input_ids"]
    full = ids[ids[:, TOKENS - 1] != 0][: max(BATCHES), :TOKENS]
    if len(full) < max(BATCHES):
        raise TersorError(
            f"bench: {len(full)} of 100 held-out sentences have {TOKENS} tokens; {max(BATCHES)} are timed"
        )
    with tempfile.TemporaryDirectory() as folder:
        for word, model in models.items():
            onnxruntime.write(Encoder(model), (full[:2],), Path(folder) / f"{word}.onnx")
        np.save(Path(folder) / "ids.npy", full.numpy())
        words = [peers, str(Path(__file__).resolve()), "--time", folder, *models]
        answers = replies(words, LIMIT) or ()
    for found in answers:
        if "missing" in found:
            print(f"{name:14} {found['runtime']}: {found['missing']}")
            continue
        where = f"{found['runtime']}, batch {found['batch']}"
        middle, low, high = found["ratio"]
        note = f"95 % interval {low:.3f} to {high:.3f}; {found['given']:.3g} to {found['slim']:.3g} ms"
        yield row(name, f"time over the given model's, {where}", round(middle, 3), "x", RATIO, note=note)


def timed(folder: Path, words: list[str]) -> None:
    """One line of JSON for each runtime and batch: milliseconds of both files, and slim's over given's."""
    ids = np.load(folder / "ids.npy")  # [B, T]
    wanted: dict[str, np.ndarray] = {}
    for runtime, opened in RUNTIMES.items():
        try:
            calls = {word: opened(str(folder / f"{word}.onnx")) for word in words}
        except ImportError as error:
            print(json.dumps({"runtime": runtime, "missing": f"not installed: {error}"}), flush=True)
            continue
        for word, call in calls.items():
            found = call(ids).copy()  # a runtime may use its outputs again
            same(f"{word}, {runtime}", found, wanted.setdefault(word, found))
        for batch in BATCHES:
            runs = {word: partial(call, ids[:batch]) for word, call in calls.items()}
            times = interleave(runs, rounds=ROUNDS, burst_ms=BURST)
            each = {word: timing.median_ms for word, timing in times.items()}
            shares = ratio(times["slim"], times["given"])
            print(json.dumps({"runtime": runtime, "batch": batch, "ratio": shares, **each}), flush=True)


def row(subject: str, what: str, value: float, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("slim_minilm", subject, what, value, unit, target, note=note)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--time"]:
        timed(Path(argv[1]), argv[2:])
        return 0
    if argv[:1] == ["--make"]:
        make(*argv[1:2])
        return 0
    mine = argparse.ArgumentParser(add_help=False)
    mine.add_argument(
        "--peers", metavar="PYTHON", default=os.environ.get("TERSOR_SLIM_PEERS", sys.executable)
    )
    options, _ = mine.parse_known_args(argv)
    return job.main(__doc__, partial(measure, peers=options.peers), ("minilm",), argv, (mine,))


if __name__ == "__main__":
    sys.exit(main())
