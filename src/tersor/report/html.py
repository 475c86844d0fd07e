"""HTML: one offline page that draws where the bytes of a file are.

treemap    a rectangle for each tensor, divided into its leaves; area = bytes       treemap.py
table      the largest first, buffers in one row; bits a weight as a bar, the order-0 entropy as a mark, a
           histogram of the codes; headings sort it
Cost: about 2 kB a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tersor.files import atomic, output
from tersor.report.console import percent, settings, whole
from tersor.report.facts import unusual
from tersor.report.largest import largest
from tersor.report.page import template
from tersor.report.show import REST, distance, signed
from tersor.report.treemap import Box, squarify

Facts = Mapping[str, Any]
MAP = Box(0, 0, 1000, 440)
LETTER, LINE = 6.4, 15  # width of a letter of a label, and height of its line
SHORTEST = 6  # letters of a label
SMALL = 0.01  # of the largest tensor's bytes
BAR, SPARK = Box(0, 0, 120, 14), Box(0, 0, 72, 22)  # the table is to be at most 1,200 pixels wide
CONTENTS = {
    "codes": "codes, indices", "masks": "masks", "floats": "floats: tables, scales, plain",
    "rest": "text, header, tensors not shown",
}  # fmt: skip
HEADINGS = (
    "tensor", "shape", "form", "weights", "bytes", "share", "bits/weight", "order 0", "distance",
    "bits against order 0", "values",
)  # fmt: skip
NUMBERS = range(3, 9)  # columns that are aligned to the right
DRAWN = range(9, 11)  # columns that cannot be sorted


class Piece(NamedTuple):
    """A rectangle of the treemap: its kind (a word of CONTENTS), its place and its tooltip."""

    kind: str
    box: Box
    title: str


class Label(NamedTuple):
    """A line of text in the treemap."""

    x: float
    y: float
    text: str


class Block(NamedTuple):
    """A tensor in the treemap."""

    pieces: list[Piece]
    labels: list[Label]


def page(facts: Facts) -> str:
    """The page for the facts of report.show.shown."""
    widest = scale_of(facts)
    order = largest(facts["sites"])
    names = [*order.shown, *order.more]
    rest = [
        (f"{len(order.buffers)} buffers", "running statistics and others", whole(held), share_of(held, facts))
        for held in [sum(facts["sites"][name]["nbytes"] for name in order.buffers)]
        if order.buffers
    ]
    rest += [
        (word, REST[word], whole(nbytes), share_of(nbytes, facts))
        for word, nbytes in facts["parts"].items()
        if word in REST
    ]
    headings = [
        {"text": text, "number": n in NUMBERS, "sorts": n not in DRAWN} for n, text in enumerate(HEADINGS)
    ]
    steps = [f"{step['step']} {settings(unusual(step))}" for step in facts["steps"]]
    return str(
        template("show.html").render(
            facts=facts, summary=summary(facts), map=MAP, blocks=list(blocks(facts)),
            contents=CONTENTS, widest=widest, headings=headings, bar=BAR, spark=SPARK, rest=rest, steps=steps,
            rows=[row(name, facts["sites"][name], facts, widest) for name in names],
        )
    )  # fmt: skip


def summary(facts: Facts) -> str:
    total, count = facts["sum"], max(facts["sum"]["weights"], 1)
    far = distance(total["nbytes"], total["order0"])
    return (
        f"{whole(facts['file']['nbytes'])} bytes, {len(facts['sites'])} tensors, "
        f"{whole(total['weights'])} weights. "
        f"Stored in {8 * total['nbytes'] / count:.3f} bits a weight; the order-0 entropy is "
        f"{total['order0'] / count:.3f} ({signed(far)})."
    )


def blocks(facts: Facts) -> Iterator[Block]:
    """The tensors of the treemap, and the rest of the file."""
    parts = [(name, site["nbytes"], site["leaves"]) for name, site in facts["sites"].items()]
    parts += [(word, nbytes, []) for word, nbytes in beside(facts) if nbytes > 0]
    boxes = squarify([nbytes for _, nbytes, _ in parts], MAP)
    for (name, nbytes, leaves), box in zip(parts, boxes, strict=True):
        if box.w * box.h > 0:
            inner = box.shrunk(1)
            yield Block(list(pieces(name, nbytes, leaves, inner, facts)), list(labels(name, inner)))


def beside(facts: Facts) -> Iterator[tuple[str, int]]:
    """What the file holds besides the tensors that are shown."""
    yield "other tensors", facts["parts"]["payload"] - facts["sum"]["nbytes"]
    for word in REST:
        yield word, facts["parts"].get(word, 0)


def pieces(name: str, nbytes: int, leaves: list[Facts], box: Box, facts: Facts) -> Iterator[Piece]:
    """One rectangle for each leaf of a tensor."""
    if not leaves:
        yield Piece("rest", box, f"{name}: {whole(nbytes)} bytes, {share_of(nbytes, facts)}")
    for leaf, place in zip(leaves, squarify([leaf["nbytes"] for leaf in leaves], box), strict=True):
        if place.w * place.h > 0:
            share = share_of(leaf["nbytes"], facts)
            yield Piece(content(leaf), place.shrunk(0.5), f"{name}: {leaf_line(leaf)}, {share} of the file")


def labels(name: str, box: Box) -> Iterator[Label]:
    """The name of a tensor, if its rectangle has room for it."""
    room, high = int((box.w - 8) / LETTER), int((box.h - 4) / LINE)
    if room >= SHORTEST and high >= 1:
        for n, line in enumerate(wrapped(name, room, high)):
            yield Label(box.x + 4, box.y + LINE * (n + 1) - 2, line)


def wrapped(name: str, room: int, high: int) -> list[str]:
    """A name in at most `high` lines of at most `room` letters, broken after dots if possible. Of a name
    that is too long the end is kept, which says more than the beginning."""
    lines: list[str] = []
    while name:
        at = name.rfind(".", 0, room) + 1 if len(name) > room else 0
        lines.append(name[: at or room])
        name = name[at or room :]
    return lines if len(lines) <= high else [f"\u2026{lines[-high][1:]}", *lines[len(lines) - high + 1 :]]


def content(leaf: Facts) -> str:
    """What a leaf holds: a word of CONTENTS."""
    if leaf["dtype"] == "bool":
        return "masks"
    return "floats" if leaf["dtype"].startswith(("float", "bfloat", "complex")) else "codes"


def leaf_line(leaf: Facts) -> str:
    """One leaf in words."""
    count, name = max(leaf["count"], 1), leaf["path"] or "weight"
    return (
        f"{name}, {leaf['form']} {leaf['dtype']}: {whole(leaf['count'])} in {whole(leaf['nbytes'])} bytes, "
        f"{8 * leaf['nbytes'] / count:.3f} bits each (order 0: {leaf['order0'] / count:.3f})"
    )


def share_of(nbytes: int, facts: Facts) -> str:
    return percent(nbytes / max(facts["file"]["nbytes"], 1))


def widths(site: Facts) -> tuple[float, float]:
    """(bits a weight, order-0 bits a weight)."""
    count = max(site["weights"], 1)
    return 8 * site["nbytes"] / count, site["order0"] / count


def scale_of(facts: Facts) -> float:
    """Bits at the end of the bars: the most of all tensors that are not small. A few floats of 32 bits should
    not shorten all other bars."""
    most = max((site["nbytes"] for site in facts["sites"].values()), default=0)
    large = (site for site in facts["sites"].values() if site["nbytes"] >= SMALL * most)
    return max((max(widths(site)) for site in large), default=0) or 1


def row(name: str, site: Facts, facts: Facts, widest: float) -> dict[str, Any]:
    """One row of the table. `numbers` are pairs of a number to sort by and its text."""
    bits, order0 = widths(site)
    far = distance(site["nbytes"], site["order0"])
    path, mark = bar(bits, order0, widest)
    return {
        "name": name,
        "weights": site["weights"],
        "shape": " x ".join(map(str, site["shape"])) or "scalar",
        "form": site["form"],
        "leaves": [leaf_line(leaf) for leaf in site["leaves"]],
        "numbers": (
            (site["weights"], whole(site["weights"])), (site["nbytes"], whole(site["nbytes"])),
            (site["nbytes"], share_of(site["nbytes"], facts)), (bits, f"{bits:.3f}"),
            (order0, f"{order0:.3f}"), ("" if far is None else far, signed(far)),
        ),
        "bar": path,
        "mark": mark,
        "histogram": spark(max(site["leaves"], key=lambda leaf: leaf["nbytes"], default=None)),
    }  # fmt: skip


def bar(bits: float, order0: float, widest: float) -> tuple[str, float]:
    """(the path of a bar for bits a weight, the place of the mark for the order-0 entropy on it)."""
    full, at = min(bits / widest, 1) * BAR.w, 1 + min(order0 / widest, 1) * (BAR.w - 2)
    point = bits > widest
    slope = f"{BAR.h / 2 - 3:g}"
    return f"M0 3H{full - 4 * point:.1f}l{4 * point} {slope}l{-4 * point} {slope}H0z", at


def spark(leaf: Facts | None) -> dict[str, str] | None:
    """A histogram of the largest leaf's values as one path, with its title."""
    if leaf is None or not leaf["counts"]:
        return None
    counts, name = leaf["counts"], leaf["path"] or "weight"
    most, step = max(counts), SPARK.w / len(counts)
    bars = "".join(
        f"M{n * step:.1f} {SPARK.h}v{-max(SPARK.h * count / most, 0.5):.1f}h{step:.1f}V{SPARK.h}z"
        for n, count in enumerate(counts)
        if count
    )
    title = f"{name}: {whole(leaf['count'])} values from {leaf['low']:g} to {leaf['high']:g}"
    return {"path": bars, "title": title}


def write(facts: Facts, path: Path, file: Path) -> dict[str, Any]:
    """Write the page; return its name and bytes. SettingError if the path is the file that it describes."""
    output(path, [file])
    data = page(facts).encode()
    with atomic(path) as out:
        out.write(data)
    return {"name": str(path), "nbytes": len(data)}
