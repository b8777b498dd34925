"use strict";

// Tables are sorted by a click on a title: by number where a cell has one, else by text; again turns the order round.
function sortBy(table, at, ascending) {
  const body = table.tBodies[0];
  const key = (row) => {
    const cell = row.cells[at];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what has no value stays last
    const order = typeof x === "number" && typeof y === "number" ? x - y
      : String(x).localeCompare(String(y), undefined, { numeric: true });
    return ascending ? order : -order;
  };
  body.append(...[...body.rows].sort(compare));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows].at(-1).cells;
  if (table.tBodies[0].rows.length < 2) continue;
  [...titles].forEach((title, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const before = title.ariaSort;
      const numeric = [...table.tBodies[0].rows].some((row) => "value" in row.cells[at].dataset);
      for (const each of titles) each.ariaSort = null;
      const ascending = before ? before === "descending" : !numeric; // the highest score first
      title.ariaSort = ascending ? "ascending" : "descending";
      sortBy(table, at, ascending);
    });
  });
}

// Whatever has a text to show, or links to a row that has one, shows it beside itself.
const tip = document.getElementById("tip");

function tipOf(element) {
  const shown = element.closest("[data-tip]");
  if (shown) return [shown, shown.dataset.tip];
  const link = element.closest("a");
  const target = link && (link.getAttribute("href") || link.getAttribute("xlink:href") || "");
  const row = target && target.startsWith("#") && document.getElementById(target.slice(1));
  const text = row && row.cells && row.cells[0].dataset.tip;
  return text ? [link, text] : [null, ""];
}

function showTip(event) {
  const [element, text] = event.target.closest ? tipOf(event.target) : [null, ""];
  tip.hidden = !element;
  if (!element) return;
  tip.textContent = text;
  const box = element.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.max(8, Math.min(box.left + box.width / 2 - width / 2, document.documentElement.clientWidth - width - 8));
  const top = box.top > height + 8 ? box.top - height - 6 : box.bottom + 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, showTip);
document.addEventListener("focusout", () => (tip.hidden = true));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
document.addEventListener("scroll", () => (tip.hidden = true), { capture: true, passive: true });

// On paper nothing is folded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
