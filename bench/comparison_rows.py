"""Comparison rows: what bench/comparisons.py measures: recipes for each letter of docs/tables.md.

A row is a network, a recipe in the words of `tersor run`, and a seed; the same row in two tables is measured
once. The last word, `entropy`, is lossless: bytes are noted before and after it. A network with widths,
lenet5:10,25,250, is that class untrained: its first weights are those after torch.manual_seed(seed).
`teacher_file=lenet5.safetensors` stands for the file of bench/networks.py with these weights.
"""

from __future__ import annotations

from dataclasses import dataclass

TEACHER = "teacher=bench/networks.py:LeNet5 teacher_file=lenet5.safetensors"
STUDENTS = ("lenet5:4,10,50", "lenet5:7,17,120", "lenet5:10,25,250")
SEEDS = (0, 1, 2)
EPOCHS = 1.0  # of a student
KEEPS = (0.5, 0.25, 0.125)
BITS = (16, 8, 6, 4, 3, 2)
HALVES = ("float16", "bfloat16")
ENTRIES = (4, 5, 6, 8, 11, 16, 23, 32, 46, 64)  # of k-means: steps of half a bit or less
SCORES = ("tensor", "channel", "group", "global", "lamp", "spread")
CRITERIA = ("redundancy", "curvature", "taylor", "activation", "l1", "l2", "median", "random")
METHODS = ("svd", "tucker", "cp", "spatial", "tt")
INTEGERS = "quantize bits=8 activations=8 entropy"


@dataclass(frozen=True)
class Trial:
    """One row: its place in a table, and what is measured."""

    group: str  # rows of a group are compared with one another
    label: str
    words: str  # of the recipe; "" if there is nothing to measure, and `why` says so
    net: str = "lenet5"
    seed: int = 0
    timed: bool = False  # in the runtimes, beside the given network
    why: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.net, self.words, self.seed


def tuning(epochs: float) -> str:
    """The settings of a training with the given network as its teacher."""
    return f"epochs={epochs:g} teacher_weight=0.5 channels_last=true"


def tuned(epochs: float) -> str:
    """The same, with a space behind it; nothing without epochs."""
    return f"{tuning(epochs)} " if epochs else ""


def alone() -> list[Trial]:
    whole = tuning(1)
    rows = {
        "coding": "entropy",
        "pruning, single weights": f"prune keep=0.1 per=lamp ramp=0.5 {whole} entropy",
        "pruning, channels": f"slim keep=0.4 {whole} entropy",
        "quantization, integers": INTEGERS,
        "quantization, 4-bit weights": f"quantize bits=4 {whole} entropy",
        "low rank": f"factorize layers=true keep=0.4 where=conv2.weight,fc1.weight distill {whole} entropy",
        "all together": f"slim keep=0.5 factorize layers=true keep=0.5 where=fc1.weight distill {whole} "
                        f"prune keep=0.3 per=lamp ramp=0.5 {whole} {INTEGERS}",
    }  # fmt: skip
    found = [Trial("", label, words, timed=True) for label, words in rows.items()]
    student = Trial("", "distillation, a student", taught(), STUDENTS[-1], timed=True)
    return [*found[:-1], student, found[-1]]


def structures() -> list[Trial]:
    found = []
    for keep in KEEPS:
        more, group = tuning(0.3), f"{100 * keep:g} % of the weights, tuned"
        one_of = {0.5: "2:4", 0.25: "1:4", 0.125: "1:8"}[keep]
        found += [
            Trial(group, label, f"{words} {more} entropy", timed=keep == KEEPS[0])
            for label, words in (
                ("single weights", f"prune keep={keep:g} per=lamp"),
                (f"N:M, {one_of}", f"prune pattern={one_of}"),
                ("channels, by the readers' weights", f"slim keep={keep:g} of=parameters"),
                ("filters, by their own weights", f"slim keep={keep:g} of=parameters by=median"),
            )
        ] + [Trial(group, "blocks", "", why="LeNet-5 has no residual branch")]
    group = "ResNet-20, 75 % of the weights, not tuned"
    return found + [
        Trial(group, label, f"{words} entropy", "resnet20", timed=True)
        for label, words in (
            ("single weights", "prune keep=0.75 per=lamp"),
            ("N:M, 3:4", "prune pattern=3:4"),
            ("channels, by the readers' weights", "slim keep=0.75 of=parameters"),
            ("filters, by their own weights", "slim keep=0.75 of=parameters by=median"),
            ("blocks", "shorten keep=0.75 of=parameters unmet=nearest"),
        )
    ]


def widths() -> list[Trial]:
    """Bits of a weight, with float and with 8-bit activations, rounded and trained."""
    found = []
    for activations in (0, 8):
        for epochs in (0.0, 0.25):
            how, reads = "trained" if epochs else "rounded", "8-bit" if activations else "float"
            group = f"{how}, {reads} activations"
            more = f"{'activations=8 ' * bool(activations)}{tuned(epochs)}entropy"
            if activations:
                found.append(Trial(group, "32", "", why="integer kernels have no 32-bit weights"))
            else:
                words = f"finetune lr=0.001 {tuning(epochs)} entropy" if epochs else "entropy"
                found.append(Trial(group, "32", words))
                found += [Trial(group, f"16, {kind}", f"quantize scheme={kind} {more}") for kind in HALVES]
            found += [Trial(group, f"{bits}", f"quantize bits={bits} {more}") for bits in BITS]
            found.append(Trial(group, "1", f"quantize scheme=binary {more}"))
    fine = "rounded, 16-bit activations"
    return found + [
        Trial(fine, f"{bits}", f"quantize bits={bits} activations=16 entropy") for bits in BITS[1:]
    ]


def levels() -> list[Trial]:
    """Kinds of levels, from fewer to more of them."""
    found = [
        Trial("linear", f"{2**b} levels", f"quantize bits={b} per=tensor entropy") for b in (2, 3, 4, 5, 6)
    ]
    found += [
        Trial("logarithmic", f"{2**b} powers of two", f"quantize scheme=log bits={b} per=tensor entropy")
        for b in (2, 3, 4, 5)
    ] + [
        Trial(
            "logarithmic", f"{2**b} sums of two", f"quantize scheme=log terms=2 bits={b} per=tensor entropy"
        )
        for b in (3, 4, 5, 6)
    ]
    return found + [Trial("k-means", f"{n} values", f"cluster entries={n} entropy") for n in ENTRIES]


def taught() -> str:
    return f"distill epochs={EPOCHS:g} lr=0.002 channels_last=true {TEACHER} entropy"


def students() -> list[Trial]:
    arms = {
        "alone": f"finetune epochs={EPOCHS:g} lr=0.002 channels_last=true entropy",
        "taught": taught(),
    }
    return [
        Trial(net, f"{arm}, seed {seed}", words, net, seed)
        for seed in SEEDS
        for net in STUDENTS
        for arm, words in arms.items()
    ]


def criteria() -> list[Trial]:
    found = []
    for epochs, how in ((0.0, "not tuned"), (0.2, "0.2 epochs")):
        more = f"{tuned(epochs)}entropy"
        group = f"prune, 10 % of the weights, {how}"
        found += [Trial(group, f"per={per}", f"prune keep=0.1 per={per} {more}") for per in SCORES]
        group = f"slim, half of the MACs, {how}"
        found += [Trial(group, f"by={by}", f"slim by={by} {more}") for by in CRITERIA]
        found.append(Trial(group, "by=norm_scale", "", why="LeNet-5 has no norms"))
    return found


def products() -> list[Trial]:
    found = []
    for group, net, where, more in (
        ("LeNet-5, conv2, not tuned", "lenet5", " where=conv2.weight keep=0.25", ""),
        ("LeNet-5, conv2, 0.3 epochs", "lenet5", " where=conv2.weight keep=0.25", f"distill {tuning(0.3)} "),
        ("ResNet-20, not tuned", "resnet20", " keep=0.5", ""),
    ):
        found += [
            Trial(group, method, f"factorize layers=true{where} method={method} {more}entropy", net,
                  timed=bool(more) or net != "lenet5")
            for method in METHODS
        ]  # fmt: skip
    return found


def integers() -> list[Trial]:
    return [Trial("", net, INTEGERS, net, timed=True) for net in ("lenet300", "lenet5", "resnet20")]


TABLES: dict[str, list[Trial]] = {
    "a": alone(), "b": structures(), "c": widths(), "d": levels(), "e": students(), "f": criteria(),
    "g": products(), "i": integers(),
}  # fmt: skip
