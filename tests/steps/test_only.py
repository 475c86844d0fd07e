"""Each setting of each step has an effect if it is accepted, and is refused if it would have none."""

from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from tiny import tiny

from tersor.core.run import run
from tersor.errors import SettingError
from tersor.setting_effects import Above, Given, only
from tersor.steps import STEPS
from tersor.steps.recipe_text import from_words

# The value at which each setting is tried; the others are at their defaults.
OTHER: dict[str, Any] = {
    "keep": 0.3, "rank": 1, "energy": 0.6, "whiten": False, "per": "tensor", "group": 3, "threshold": 0.2,
    "pattern": "1:4", "ramp": 0.5, "rounds": 2, "rewind": "weights", "scheme": "log", "bits": 3,
    "symmetric": False, "range": "mse", "percentile": 80.0, "low": -0.1, "high": 0.2, "terms": 2,
    "rule": "exact", "entries": 3, "init": "linear", "iterations": 1, "epochs": 2.0, "lr": 0.02,
    "schedule": "constant", "optimizer": "sgd", "weight_decay": 0.3, "teacher_weight": 0.3,
    "temperature": 2.5,
    "bf16": True, "max_grad_norm": 1e-3, "lr_of": "*=0.1", "teacher": "zoo:resnet18",
    "features": "block", "feature_weight": 0.1, "feature_loss": "relation", "nbytes": 300,
    "price": 0.01, "step": 0.2, "max_drop": 40.0, "lam": 0.01, "weigh": "inputs", "damp": 0.5,
    "coder": "huffman", "threads": 2, "batch": 2, "latency": True, "runtime": "openvino", "vectors": False,
    "activations": 8, "smooth": False, "balance": False, "correct": False, "rounding": "gptq", "awq": True,
    "activation_range": "percentile", "activation_percentile": 80.0,
    "allowed": "2,4", "mean_bits": 2.0, "multiple": 3, "layers": True, "method": "tucker",
    "penalty": 3.0, "before": 0.3,
}  # fmt: skip
ELSE = {word: {"per": "channel"} for word in ("cluster", "rdoq", "penalize")} | {
    "prune": {"per": "channel", "correct": False},
    "rdoq": {"per": "channel", "nbytes": 3000},
    "penalize": {"per": "channel", "nbytes": 9000, "bits": 8.0}
}  # fmt: skip
UNMET = {
    "scheme": "float16",
    "weigh": "none",
    "where": "s*",
    "activation_range": "dynamic",
}  # values at which others have no effect
# Other tests show the effect of these: on speed or paths only, in long trainings, in larger models.
NOT_HERE = {
    "where", "weights", "channels_last", "frozen", "teacher", "teacher_file", "features", "arrange", "to",
    "path", "dynamic_batch", "dynamic_axes", "smooth", "balance", "products", "warm", "passes", "vectors",
    "runtime", "awq", "of", "saturate",
}  # fmt: skip
# Settings of both runs, if the defaults would hide the effect.
BOTH: dict[tuple[str, str], dict[str, Any]] = {
    ("quantize", "low"): {"low": -0.3, "high": 0.2},
    ("quantize", "high"): {"high": 0.1},
    ("quantize", "max_drop"): {"allowed": "2,4"},
    ("cluster", "weight_decay"): {"where": "head.weight"},
    **{("penalize", key): {"epochs": 8.0} for key in ("nbytes", "bits")},
}
# What cuts units and branches needs a network with more of them: test_slim.py, test_fold.py, test_shorten.py.
UNITS = ("slim", "shorten", "fold")
CASES = [
    (word, f.name) for word, kind in STEPS.items() for f in fields(kind)
    if f.name not in NOT_HERE and word not in UNITS
]  # fmt: skip
EXPORTED = ("latency", "threads", "batch")  # a second and more each
QUICK = tuple({key for _, key in CASES} - {*EXPORTED})


@cache
def outcome(word: str, **settings: Any) -> Any:
    """The visible results of a run: the forms, and the notes of measure."""
    t = tiny("conv")
    result = run(t.model, STEPS[word](**settings), t.task)
    timed = [e.data for e in result.ledger.entries if e.kind == "latency"]
    return result.digest, [(data["threads"], data["batch"]) for data in timed]


def going(word: str, key: str) -> dict[str, Any]:
    """Settings with which this one is accepted, from the step's declarations."""
    found: dict[str, Any] = {}
    for other, wanted in only(STEPS[word]).get(key, {}).items():
        if getattr(STEPS[word](), other) not in wanted:
            found |= going(word, other) | {other: met(word, other, wanted)}
    return found


def met(word: str, key: str, wanted: Any) -> Any:
    if isinstance(wanted, Above):
        return type(getattr(STEPS[word](), key))(wanted.number + 1)
    return OTHER[key] if isinstance(wanted, Given) else wanted[0]


def unmet(word: str, key: str, wanted: Any) -> Any:
    """A value at which another setting has no effect."""
    usual = getattr(STEPS[word](), key)
    if isinstance(wanted, Above):
        return type(usual)(wanted.number)
    return usual if usual not in wanted else UNMET.get(key, OTHER.get(key))


def other_than_usual(word: str, key: str) -> Any:
    return ELSE.get(word, {}).get(key, OTHER.get(key, True))


@pytest.mark.sampled(key=QUICK)
@pytest.mark.parametrize(("word", "key"), CASES)
def test_an_accepted_setting_has_an_effect(word: str, key: str) -> None:
    both = going(word, key) | ({"epochs": 1.0} if word == "penalize" else {}) | BOTH.get((word, key), {})
    changed = both | {key: other_than_usual(word, key)}
    assert outcome(word, **changed) != outcome(word, **both)


@pytest.mark.parametrize(
    ("word", "key", "other"),
    [(word, key, other) for word in STEPS for key, needs in only(STEPS[word]).items() for other in needs],
)
def test_a_setting_without_effect_is_refused(word: str, key: str, other: str) -> None:
    beside = going(word, key) | going(word, other)
    needed = unmet(word, other, only(STEPS[word])[key][other])
    with pytest.raises(SettingError):
        STEPS[word](**beside | {key: other_than_usual(word, key), other: needed})


REFUSED = {
    "quantize bits=4 group=32": "group=32 has no effect if per='channel'. It needs per=group: give that",
    "quantize scheme=binary bits=2": "bits=2 has no effect if scheme='binary'. It needs scheme=uniform ",
    "quantize scheme=float16 per=tensor": "per='tensor' has no effect if scheme='float16'",
    "quantize percentile=99": "percentile=99.0 has no effect if range='auto'. It needs range=percentile",
    "quantize scheme=ternary symmetric=false": "symmetric=False has no effect if scheme='ternary'",
    "quantize scheme=log range=percentile": "range='percentile'",
    "quantize terms=2": "terms=2 has no effect if scheme='uniform'",
    "quantize rule=exact": "rule='exact' has no effect if scheme='uniform'",
    "quantize high=1": "high=1.0 has no effect if range='auto'",
    "quantize damp=0.1": "damp=0.1 has no effect if rounding='nearest'. It needs rounding=gptq",
    "quantize rounding=gptq epochs=2": "rounding='gptq' has no effect if epochs=2.0. It needs epochs=0",
    "quantize rounding=gptq scheme=log": "rounding='gptq' has no effect if scheme='log'",
    "quantize rounding=best": "rounding='best'",
    "quantize range=output": "the error of outputs is known to rounding=gptq, adaround and brecq alone",
    "quantize rounding=gptq damp=2": "damp=2.0, but it is a share: 0 < damp <= 1",
    "quantize range=fixed": "range=fixed with low=None and high=None, but low <= 0 <= high",
    "quantize range=fixed high=1 low=-1": "low=-1.0 has no effect if symmetric=True. It needs symm",
    "quantize range=fixed symmetric=false low=0.5 high=1": "low <= 0 <= high",
    "quantize lr=0.1": "lr=0.1 has no effect if epochs=0.0. It needs epochs above 0: give that, or",
    "prune keep=0.1 pattern=2:4": "keep=0.1 has no effect if pattern='2:4'. It needs no pattern: leave",
    "prune threshold=0.1 per=channel": "per='channel' has no effect if threshold=0.1",
    "prune threshold=0.1 pattern=2:4": "threshold=0.1 has no effect if pattern='2:4'",
    "prune epochs=1 rewind=weights": "rewind='weights' has no effect if rounds=1",
    "prune rounds=3": "rounds=3 has no effect if epochs=0.0",
    "cluster iterations=9": "iterations=9 has no effect if init='exact'. It needs init=linear, density or ",
    "cluster epochs=1 temperature=2": "temperature=2.0 has no effect if teacher_weight=0.0",
    "distill feature_weight=2": "feature_weight=2.0 has no effect if features=''. It needs features: give",
    "penalize nbytes=900 bits=2": "bits=2.0 has no effect if nbytes=900",
    "rdoq weigh=none damp=0.1": "damp=0.1 has no effect if weigh='none'",
    "measure threads=2": "threads=2 has no effect if latency=False. It needs latency=true",
}


@pytest.mark.parametrize("words", REFUSED)
def test_the_refusal_says_what_it_needs(words: str) -> None:
    with pytest.raises(SettingError) as caught:
        from_words(words.split(), STEPS)
    assert REFUSED[words] in str(caught.value)
