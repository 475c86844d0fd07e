"""Style: how the page of html.py looks, by light and by dark, and how its table is sorted.

Letters on every fill have a contrast of at least 7; what color tells, words beside it tell too.
"""

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --line: #d9d8d3;
  --bar: #2a78d6; --mark: #0b0b0b; --codes: #b7d3f6; --codes-edge: #2a78d6; --masks: #f6d9a4;
  --masks-edge: #a86a00; --floats: #b9e3cd; --floats-edge: #14794f; --rest: #e1e0d9; --rest-edge: #77766f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --line: #3a3a37; --bar: #3987e5; --mark: #ffffff;
    --codes: #184f95; --codes-edge: #6ea8ec; --masks: #6b4300; --masks-edge: #dfa23c; --floats: #0d5537;
    --floats-edge: #4fbd8c; --rest: #3f3e3a; --rest-edge: #98978e; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.35rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; }
p, small, caption { color: var(--soft); }
figure { margin: 1rem 0 .5rem; } figure svg { display: block; width: 100%; height: auto; }
figure text { font: 11px system-ui, sans-serif; fill: var(--ink); pointer-events: none; }
rect.codes { fill: var(--codes); stroke: var(--codes-edge); }
rect.masks { fill: var(--masks); stroke: var(--masks-edge); }
rect.floats { fill: var(--floats); stroke: var(--floats-edge); }
rect.rest { fill: var(--rest); stroke: var(--rest-edge); }
figure rect { stroke-width: .5; } figure rect:hover { stroke: var(--ink); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; padding: 0; font-size: .9rem; }
.key { display: inline-block; width: .9em; height: .9em; margin-right: .45em; vertical-align: -.1em;
  border: 1px solid; }
.key.codes { background: var(--codes); border-color: var(--codes-edge); }
.key.masks { background: var(--masks); border-color: var(--masks-edge); }
.key.floats { background: var(--floats); border-color: var(--floats-edge); }
.key.rest { background: var(--rest); border-color: var(--rest-edge); }
.wide { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
tbody th { font-weight: normal; overflow-wrap: anywhere; min-width: 15rem; } td { white-space: nowrap; }
td:nth-child(3) { white-space: normal; min-width: 9rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; white-space: nowrap; }
thead button:hover { text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
details[open] { min-width: 26rem; }
details ul { margin: .3rem 0; padding-left: 1.1rem; } summary { cursor: pointer; }
.bar path { fill: var(--bar); } .bar line { stroke: var(--mark); stroke-width: 2; }
.spark path { fill: var(--soft); }
"""

# A click on a head sorts by its column: first the largest numbers, or names from A to Z; then the other way.
SCRIPT = """
"use strict";
for (const head of document.querySelectorAll("thead th")) {
  const button = head.querySelector("button");
  if (button) button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const sorted = head.getAttribute("aria-sort");
    const numbers = body.rows.length > 0 && "by" in body.rows[0].cells[column].dataset;
    const first = numbers ? "descending" : "ascending";
    const other = numbers ? "ascending" : "descending";
    const order = sorted === first ? other : first, sign = order === "ascending" ? 1 : -1;
    const key = (row) => {
      const cell = row.cells[column];
      return numbers ? (cell.dataset.by === "" ? -Infinity : Number(cell.dataset.by)) : cell.textContent;
    };
    const compare = (a, b) => numbers ? Math.sign(key(a) - key(b)) || 0 : key(a).localeCompare(key(b));
    for (const each of head.parentNode.cells) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
  });
}
"""
