// A click on a heading sorts the table by its column: largest numbers or A to Z first, then the reverse.
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
