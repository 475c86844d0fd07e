"""The page of `tersor show --html`: one file, well formed, offline, and safe for any names in a file."""

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.state import State
from tersor.encode import coded
from tersor.errors import SettingError, visible
from tersor.forms import Affine, Dense, Masked
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.sites import Site
from tersor.record.ledger import Ledger
from tersor.report import html
from tersor.report.page import template
from tersor.report.show import shown, tables

VOID = {"meta", "br", "link", "img", "input"}
HOSTILE = (
    '<script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    "</title></style><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "&lt;b&gt; & \u202ereversed\u200b\x00\x1b[31m",
    "{{7*7}}]]>--><!--",
)  # fmt: skip


class Page(HTMLParser):
    """The elements with attributes, and the text, of a page. Tags that do not match fail."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def model() -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(0)
    w = torch.randn(16, 24, generator=drawn)
    codes = (2 * w).round().clamp(-7, 7).to(torch.int8)
    keep = w.abs() > 0.3
    return {
        "grid.weight": Affine(coded(codes), Dense(torch.ones(16, 1)), bits=4),
        "masked.weight": Masked(coded(keep), Dense(w)),
        "plain.bias": Dense(torch.randn(16, generator=drawn)),
        "steps": Dense(torch.tensor(3)),
        "empty": Dense(torch.zeros(0)),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(model(), tmp_path / "m.tersor")


def written(forms: dict[str, Any], path: Path) -> Path:
    sites = {
        name: Site(name, tuple(form.shape), str(form.decode().dtype).removeprefix("torch."), "other")
        for name, form in forms.items()
    }
    save(State(sites, forms, {}, Ledger("", {})), path)
    return path


def facts_of(path: Path, site: str | None = None) -> dict[str, Any]:
    return shown(load(path), path, site)


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(file: Path) -> None:
    source = html.page(facts_of(file))
    page = Page(source)
    assert {"html", "head", "main", "svg", "table", "caption", "thead", "tbody", "script", "style"} <= {
        tag for tag, _ in page.elements
    }
    assert not any(tag in {"link", "img", "iframe", "object", "use", "image"} for tag, _ in page.elements)
    for _, attributes in page.elements:
        assert not {"src", "href", "xlink:href", "onclick", "style"} & set(attributes)
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source
    assert "@import" not in source
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "prefers-color-scheme: dark" in source


def test_every_tensor_has_a_row_and_a_place_on_the_map(file: Path) -> None:
    facts = facts_of(file)
    page = Page(html.page(facts))
    rows = [m for m in page.all("th") if m.get("scope") == "row"]
    assert len(rows) == len(facts["sites"]) + 2  # text and header
    assert len(page.all("button")) == len(html.HEADINGS) - len(html.DRAWN)
    leaves = sum(leaf["nbytes"] > 0 for site in facts["sites"].values() for leaf in site["leaves"])
    kinds = [m for m in page.all("rect") if m.get("class") in html.CONTENTS]
    assert len(kinds) == leaves + 2
    area = dict.fromkeys(html.CONTENTS, 0.0)
    for found in kinds:
        area[str(found["class"])] += float(str(found["width"])) * float(str(found["height"]))
    masks = facts["sites"]["masked.weight"]["leaves"][0]["nbytes"]
    share = area["masks"] / sum(area.values())
    assert share == pytest.approx(masks / file.stat().st_size, rel=0.15)  # but for the gaps


def test_the_largest_come_first_and_buffers_are_one_row(tmp_path: Path) -> None:
    forms: dict[str, Any] = {f"w{n}": Dense(torch.zeros(10 * n + 1)) for n in range(40)}
    forms |= {f"mean{n}": Dense(torch.zeros(9)) for n in range(5)}
    facts = facts_of(written(forms, tmp_path / "m.tersor"))
    for n in range(5):
        facts["sites"][f"mean{n}"]["kind"] = "buffer"
    source = html.page(facts)
    Page(source)  # well formed
    names = re.findall(r'<th scope="row">(.*?)</th>', source)
    assert names == [*(f"w{n}" for n in range(39, -1, -1)), "5 buffers", "text", "header"]
    assert re.search(r"5 buffers</th>.*?>180<", source, re.S)  # 5 * 9 floats


def test_the_page_fits_in_1200_pixels(tmp_path: Path) -> None:
    """Widths that are fixed, in pixels of a font of 15: those of the table's columns add up."""
    name = "encoder.layers.11.self_attention.query_key_value.projection.weight" * 3
    source = html.page(facts_of(written({name: Dense(torch.zeros(1000, 1000))}, tmp_path / "m.tersor")))
    style = re.findall(r"<style>(.*?)</style>", source, re.S)[0]
    rem = 16
    fixed = {
        (key, value, unit): float(value) * {"px": 1, "rem": rem, "em": 15}[unit]
        for key, value, unit in re.findall(r"((?:min-|max-)?width): ([\d.]+)(px|rem|em)", style)
    }
    assert fixed
    assert max(fixed.values()) <= 1200
    numbers = sum(7.2 * max(len(h), len("1,000,000")) for h in html.HEADINGS[3:9])  # 13.5 pixel digits
    columns = 11 * rem + 6 * rem + 6 * rem + numbers + html.BAR.w + html.SPARK.w
    padding = len(html.HEADINGS) * 2 * 0.35 * rem
    assert "min-width: 11rem" in style
    assert "min-width: 6rem" in style
    assert "overflow-wrap: anywhere" in style
    assert columns + padding + 2 * 1.25 * rem <= 1200
    assert all(float(str(svg.get("width", 0))) <= 200 for svg in Page(source).all("svg"))


def test_colors_have_words_too(file: Path) -> None:
    page = Page(html.page(facts_of(file)))
    assert [m for m in page.all("svg") if m.get("role") == "img" and m.get("aria-labelledby")]
    for svg in page.all("svg"):
        assert svg.get("role") == "img" or svg.get("aria-hidden") == "true"
    assert all(said in "".join(page.texts) for said in html.CONTENTS.values())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_and_not_run(tmp_path: Path, name: str) -> None:
    forms = {name: Dense(torch.randn(40, 40)), "other": Dense(torch.zeros(3))}
    facts = facts_of(written(forms, tmp_path / "m.tersor"))
    facts["file"]["name"] = name
    facts["steps"] = [{"step": name, "settings": {}, "notes": [], "sites": {}}]
    facts["sites"][name]["form"] = name
    calm = facts_of(
        written({"calm": Dense(torch.randn(40, 40)), "other": Dense(torch.zeros(3))}, tmp_path / "c")
    )
    page, plain = Page(html.page(facts)), Page(html.page(calm))
    tags = [tag for tag, _ in page.elements if tag not in {"ol", "li", "h2", "text"}]
    assert tags == [tag for tag, _ in plain.elements if tag not in {"ol", "li", "h2", "text"}]
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    seen = "".join(page.texts)
    assert name.split("\u202e", maxsplit=1)[0] in seen
    assert not re.search("[\u202e\u200b\x00\x1b]", seen)


@given(st.text())
@settings(max_examples=200)
def test_text_is_escaped_and_can_be_written(value: str) -> None:
    found = template("show.html").environment.from_string("{{ value }}").render(value=value)
    assert not set(found) & set("<>\"'\x00\u202e\r\n")
    found.encode()
    if value.isprintable():
        assert unescape(found) == value


def test_a_lone_surrogate_can_be_written() -> None:
    assert visible("\ud800") == "\\u{d800}"


def test_the_templates_mark_nothing_as_safe() -> None:
    """A value that is marked as safe would not be escaped."""
    folder = Path(html.__file__).parent / "templates"
    sources = {path.name: path.read_text() for path in folder.glob("*.html")}
    assert set(sources) == {"page.html", "show.html", "search.html"}
    assert not any(re.search(r"\bsafe\b|autoescape|Markup", source) for source in sources.values())
    included = {name for source in sources.values() for name in re.findall(r'include "(.*?)"', source)}
    assert included == {"page.css", "page.js"}


def test_one_tensor_of_many_is_shown_beside_the_others(file: Path) -> None:
    facts = facts_of(file, "grid*")
    page = Page(html.page(facts))
    assert any(text.startswith("other tensors: ") for text in page.texts)
    assert list(facts["sites"]) == ["grid.weight"]


def test_bars_and_marks_are_of_one_scale_and_end_with_it() -> None:
    def drawn(bits: float, order0: float) -> tuple[float, float]:
        path, mark = html.bar(bits, order0, 4.0)
        ends = re.match(r"M0 3H([\d.]+)l(\d+) ", path)
        assert ends
        return float(ends[1]) + float(ends[2]), (mark - 1) / (html.BAR.w - 2)

    assert drawn(2, 4) == pytest.approx((html.BAR.w / 2, 1))
    assert drawn(4, 1) == pytest.approx((html.BAR.w, 0.25), abs=1e-3)
    assert drawn(32, 32) == pytest.approx((html.BAR.w, 1))


def test_a_few_floats_do_not_make_all_other_bars_short() -> None:
    def site(weights: int, bits: float) -> dict[str, Any]:
        return {"weights": weights, "nbytes": weights * bits / 8, "order0": weights * bits}

    assert html.scale_of({"sites": {"w": site(100_000, 4), "b": site(100, 32)}}) == 4
    assert html.scale_of({"sites": {"w": site(1000, 4), "b": site(100, 32)}}) == 32
    assert html.scale_of({"sites": {}}) == 1


@given(st.text("ab.", min_size=1, max_size=60), st.integers(4, 12), st.integers(1, 6))
def test_a_label_fits_and_ends_as_the_name_does(name: str, room: int, high: int) -> None:
    lines = html.wrapped(name, room, high)
    assert 1 <= len(lines) <= high
    assert all(1 <= len(line) <= room for line in lines)
    if "".join(lines) != name:
        assert lines[0].startswith("\u2026")
        assert name.endswith("".join(lines)[1:])
    assert html.wrapped("encoder.layer.0.weight", 10, 3) == ["encoder.", "layer.0.", "weight"]


def test_a_histogram_is_as_high_as_its_largest_count() -> None:
    leaf = {"counts": [1, 0, 4], "count": 5, "path": "", "low": -1.0, "high": 1.0}
    found = html.spark(leaf)
    assert found is not None
    heights = [-float(h) for h in re.findall(r"v(-?[\d.]+)", found["path"])]
    assert heights == pytest.approx([html.SPARK.h / 4, html.SPARK.h], abs=0.06)
    assert html.spark(None) is None


def test_the_page_does_not_take_the_place_of_the_file(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(SettingError, match="is also the input"):
        html.write(facts_of(file), file, file)
    assert file.read_bytes() == before
    out = file.with_name("page.html")
    written = html.write(facts_of(file), out, file)
    assert written == {"name": str(out), "nbytes": out.stat().st_size}
    assert out.read_bytes().startswith(b"<!doctype html>")


def test_parts_add_up_to_the_file_and_distances_are_those_of_the_leaves(file: Path) -> None:
    facts = facts_of(file)
    assert sum(facts["parts"].values()) == facts["file"]["nbytes"] == file.stat().st_size
    assert facts["sum"]["nbytes"] == facts["parts"]["payload"]
    site = facts["sites"]["grid.weight"]
    assert site["nbytes"] == sum(leaf["nbytes"] for leaf in site["leaves"]) == site["stored"] // 8
    assert site["order0"] == pytest.approx(site["bound"])  # few floats count as they are in both
    assert site["share"] == site["nbytes"] / file.stat().st_size
    assert len(list(tables(facts))) >= 3


def test_a_file_with_the_short_header_has_no_header_of_safetensors(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "t.tersor"
    save(load(file), path, tiny=True)
    facts = facts_of(path)
    assert set(facts["parts"]) == {"payload", "text"}
    assert sum(facts["parts"].values()) == path.stat().st_size
    assert Page(html.page(facts)).all("table")
