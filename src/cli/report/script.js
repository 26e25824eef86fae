"use strict";
// Sorting and searching; without it, every table stands as it is.
function tables(root) {
  root.querySelectorAll("figure:not(.map)").forEach(table);
}
function table(figure) {
  const body = figure.querySelector("tbody");
  const heads = [...figure.querySelectorAll("thead th")];
  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? -1 : 1;
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.title = "Sort by this";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending" || (!head.ariaSort && !head.classList.contains("n"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [value(row, i), row]);
      rows.sort((a, b) => (up ? 1 : -1) * compare(a[0], b[0]));
      body.append(...rows.map((pair) => pair[1]));
    });
  });
  const filter = figure.querySelector(".filter");
  if (!filter) return;
  filter.hidden = false;
  const count = filter.querySelector("output");
  filter.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = shown + " of " + body.rows.length;
  });
}
tables(document);
