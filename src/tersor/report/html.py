"""HTML: one page that draws where the bytes of a file are. It works offline: no script, font or picture from
elsewhere, and its policy forbids them.

treemap    a rectangle a tensor, in it one a leaf; area = bytes       treemap.py
table      bits a weight as a bar, its order-0 entropy as a mark, a histogram of the codes; heads sort it
Names come from the file: whatever they hold is shown, never run. Cost: some 2 kB a tensor.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tersor.files import atomic, output
from tersor.report.console import percent, settings, whole
from tersor.report.facts import unusual
from tersor.report.html_style import SCRIPT, STYLE
from tersor.report.show import REST, distance, signed
from tersor.report.treemap import Box, squarify

Facts = Mapping[str, Any]
MAP = Box(0, 0, 1000, 440)
LETTER, LINE = 6.4, 15  # what a letter of a label needs, and its line
SHORTEST = 6  # letters of a label
SMALL = 0.01  # of the largest tensor's bytes
BAR, SPARK = Box(0, 0, 140, 14), Box(0, 0, 96, 22)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CONTENTS = {
    "codes": "codes, indices", "masks": "masks", "floats": "floats: tables, scales, plain",
    "rest": "text, header, tensors not shown",
}  # fmt: skip
HEADS = (
    "tensor", "shape", "form", "weights", "bytes", "share", "bits/weight", "order 0", "distance",
    "bits against order 0", "values",
)  # fmt: skip
NUMBERS = range(3, 9)  # columns that stand to the right
DRAWN = range(9, 11)  # columns that cannot be sorted
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # kinds of characters that are shown by their number


def page(facts: Facts) -> str:
    """The page of what report.show.shown found."""
    name = text(facts["file"]["name"])
    policy = html.escape(POLICY)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: where the bytes are</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n<p>{summary(facts)}</p>\n"
        f"{treemap(facts)}\n{legend()}\n{table(facts)}\n{history(facts)}"
        f"<p><small>result {text(facts['result'])}, base {text(facts['base']) or 'not told'}</small></p>\n"
        f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """As HTML: its marks escaped, and what cannot be seen or turns the line around shown by its number."""
    seen = (
        f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in HIDDEN else c  # as \u{202e}
        for c in str(value)
    )
    return html.escape("".join(seen), quote=True)


def summary(facts: Facts) -> str:
    total, count = facts["sum"], max(facts["sum"]["weights"], 1)
    far = distance(total["nbytes"], total["order0"])
    return (
        f"{whole(facts['file']['nbytes'])} bytes, {len(facts['sites'])} tensors, "
        f"{whole(total['weights'])} weights. "
        f"Stored in {8 * total['nbytes'] / count:.3f} bits a weight; the order-0 entropy is "
        f"{total['order0'] / count:.3f} ({signed(far)})."
    )


def treemap(facts: Facts) -> str:
    """Where the bytes are, as one picture."""
    blocks = [(name, site["nbytes"], site["leaves"]) for name, site in facts["sites"].items()]
    blocks += [(word, nbytes, []) for word, nbytes in beside(facts) if nbytes > 0]
    boxes = squarify([nbytes for _, nbytes, _ in blocks], MAP)
    parts = [
        part
        for (name, _, leaves), box in zip(blocks, boxes, strict=True)
        if box.w * box.h > 0
        for part in block(name, leaves, box.shrunk(1), facts)
    ]
    return (
        f'<figure><svg viewBox="0 0 {MAP.w} {MAP.h}" role="img" aria-labelledby="map-title map-desc">'
        f'<title id="map-title">Where the bytes are</title>'
        f'<desc id="map-desc">Areas are bytes: a rectangle for each tensor, parted into its leaves. The '
        f"table below has the same numbers.</desc>\n" + "\n".join(parts) + "</svg></figure>"
    )


def beside(facts: Facts) -> Iterator[tuple[str, int]]:
    """What is in the file beside the tensors that are shown."""
    yield "other tensors", facts["parts"]["payload"] - facts["sum"]["nbytes"]
    for word in REST:
        yield word, facts["parts"].get(word, 0)


def block(name: str, leaves: list[Facts], box: Box, facts: Facts) -> Iterator[str]:
    """One tensor: its leaves, and its name where there is room."""
    whole_file = max(facts["file"]["nbytes"], 1)
    if not leaves:
        nbytes = dict(beside(facts))[name]
        yield rectangle("rest", box, f"{name}: {whole(nbytes)} bytes, {percent(nbytes / whole_file)}")
    for leaf, place in zip(leaves, squarify([leaf["nbytes"] for leaf in leaves], box), strict=True):
        if place.w * place.h > 0:
            share = percent(leaf["nbytes"] / whole_file)
            said = f"{name}: {leaf_line(leaf)}, {share} of the file"
            yield rectangle(content(leaf), place.shrunk(0.5), said)
    room, high = int((box.w - 8) / LETTER), int((box.h - 4) / LINE)
    if room >= SHORTEST and high >= 1:
        for n, said in enumerate(wrapped(name, room, high)):
            yield f'<text x="{box.x + 4:.1f}" y="{box.y + LINE * (n + 1) - 2:.1f}">{text(said)}</text>'


def wrapped(name: str, room: int, high: int) -> list[str]:
    """A name in lines of at most so many letters, broken behind dots where that can be. Where the lines are
    too few its end is kept, which tells more than its beginning."""
    lines: list[str] = []
    while name:
        at = name.rfind(".", 0, room) + 1 if len(name) > room else 0
        lines.append(name[: at or room])
        name = name[at or room :]
    return lines if len(lines) <= high else [f"\u2026{lines[-high][1:]}", *lines[len(lines) - high + 1 :]]


def rectangle(kind: str, box: Box, said: str) -> str:
    return (
        f'<rect class="{kind}" x="{box.x:.2f}" y="{box.y:.2f}" width="{box.w:.2f}" height="{box.h:.2f}">'
        f"<title>{text(said)}</title></rect>"
    )


def content(leaf: Facts) -> str:
    """What is in a leaf: a word of CONTENTS."""
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


def legend() -> str:
    items = (f'<li><span class="key {kind}"></span>{said}</li>' for kind, said in CONTENTS.items())
    return f'<ul class="legend" aria-label="Colors">{"".join(items)}</ul>'


def table(facts: Facts) -> str:
    """A row a tensor; a head sorts by its column."""
    heads = "".join(
        f'<th scope="col"{classed(n)}>{said if n in DRAWN else f"<button type=button>{said}</button>"}</th>'
        for n, said in enumerate(HEADS)
    )
    widest = scale_of(facts)
    rows = "\n".join(row(name, site, facts, widest) for name, site in facts["sites"].items())
    rest = "".join(
        f'<tr><th scope="row">{word}</th><td></td><td>{REST[word]}</td><td></td>'
        f'<td class="number">{whole(nbytes)}</td><td class="number">{share_of(nbytes, facts)}</td></tr>'
        for word, nbytes in facts["parts"].items()
        if word in REST
    )
    return (
        '<div class="wide" role="region" aria-label="Tensors" tabindex="0"><table>'
        f"<caption>Bits a weight are a bar from 0 to {widest:.3g} (what is longer ends in a point), their "
        "order-0 entropy is the mark; values are histograms</caption>"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody>\n<tfoot>{rest}</tfoot></table></div>"
    )


def classed(column: int) -> str:
    return ' class="number"' if column in NUMBERS else ""


def share_of(nbytes: int, facts: Facts) -> str:
    return percent(nbytes / max(facts["file"]["nbytes"], 1))


def widths(site: Facts) -> tuple[float, float]:
    """(bits a weight, order-0 bits a weight)."""
    count = max(site["weights"], 1)
    return 8 * site["nbytes"] / count, site["order0"] / count


def scale_of(facts: Facts) -> float:
    """Bits at the end of the bars: the most of tensors that matter. A few floats of 32 bits should not make
    all other bars short."""
    most = max((site["nbytes"] for site in facts["sites"].values()), default=0)
    matter = (site for site in facts["sites"].values() if site["nbytes"] >= SMALL * most)
    return max((max(widths(site)) for site in matter), default=0) or 1


def row(name: str, site: Facts, facts: Facts, widest: float) -> str:
    bits, order0 = widths(site)
    far = distance(site["nbytes"], site["order0"])
    shape = " x ".join(map(str, site["shape"])) or "scalar"
    numbers = (
        (site["weights"], whole(site["weights"])), (site["nbytes"], whole(site["nbytes"])),
        (site["nbytes"], share_of(site["nbytes"], facts)), (bits, f"{bits:.3f}"), (order0, f"{order0:.3f}"),
        ("" if far is None else far, signed(far)),
    )  # fmt: skip
    cells = "".join(f'<td class="number" data-by="{by}">{said}</td>' for by, said in numbers)
    inside = "".join(f"<li>{text(leaf_line(leaf))}</li>" for leaf in site["leaves"])
    form = f"<details><summary>{text(site['form'])}</summary><ul>{inside}</ul></details>"
    largest = max(site["leaves"], key=lambda leaf: leaf["nbytes"], default=None)
    return (
        f'<tr><th scope="row">{text(name)}</th><td data-by="{site["weights"]}">{shape}</td><td>{form}</td>'
        f"{cells}<td>{bar(bits, order0, widest)}</td><td>{spark(largest)}</td></tr>"
    )


def bar(bits: float, order0: float, widest: float) -> str:
    """Bits a weight as a bar, the order-0 entropy as a mark on it; the numbers stand beside it."""
    full, at = min(bits / widest, 1) * BAR.w, 1 + min(order0 / widest, 1) * (BAR.w - 2)
    point = bits > widest
    shape = f"M0 3H{full - 4 * point:.1f}l{4 * point} {BAR.h / 2 - 3:g}l{-4 * point} {BAR.h / 2 - 3:g}H0z"
    return (
        f'<svg class="bar" width="{BAR.w}" height="{BAR.h}" aria-hidden="true"><path d="{shape}"/>'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{BAR.h}"/></svg>'
    )


def spark(leaf: Facts | None) -> str:
    """A histogram of the largest leaf's values, as one path."""
    if leaf is None or not leaf["counts"]:
        return ""
    counts, name = leaf["counts"], leaf["path"] or "weight"
    most, step = max(counts), SPARK.w / len(counts)
    bars = "".join(
        f"M{n * step:.1f} {SPARK.h}v{-max(SPARK.h * count / most, 0.5):.1f}h{step:.1f}V{SPARK.h}z"
        for n, count in enumerate(counts)
        if count
    )
    said = text(f"{name}: {whole(leaf['count'])} values from {leaf['low']:g} to {leaf['high']:g}")
    return (
        f'<svg class="spark" width="{SPARK.w}" height="{SPARK.h}" role="img" aria-label="{said}">'
        f'<title>{said}</title><path d="{bars}"/></svg>'
    )


def history(facts: Facts) -> str:
    """What was done, a step a line."""
    if not facts["steps"]:
        return ""
    items = (f"<li>{text(step['step'])} {text(settings(unusual(step)))}</li>" for step in facts["steps"])
    return f"<h2>What was done</h2>\n<ol>{''.join(items)}</ol>\n"


def write(facts: Facts, path: Path, file: Path) -> dict[str, Any]:
    """Write the page; its name and bytes. SettingError where the path is the file that it is about."""
    output(path, [file])
    data = page(facts).encode()
    with atomic(path) as out:
        out.write(data)
    return {"name": str(path), "nbytes": len(data)}
