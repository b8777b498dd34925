// The column beside the map: what colours it, the legend, the selection, the pinned cell. All text is set as text.

let colorField = fields[0];
let selection = null; // cells, ascending, or null
let pinned = -1;
const galleries = {
  selection: new Gallery(element("selected-cells"), { columns: 6, size: 46, most: 24, onPick: (cell) => pin(cell) }),
  neighbours: new Gallery(element("neighbours"), { columns: 6, size: 46, most: 12, onPick: (cell) => pin(cell) }),
};
const scale = facts.scale.map(pixelOf);

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Colours and levels of all points, after any change of field, legend or selection.
function recolor() {
  const { kind, codes, hidden, values, low, high } = colorField;
  const colors = kind === "category" ? new Map(colorField.colors.map((hex, code) => [code, pixelOf(hex)])) : null;
  colors?.set(MISSING, pixelOf("#bebebe"));
  const chosen = selection && new Uint8Array(count);
  selection?.forEach((cell) => (chosen[cell] = 1));
  for (let cell = 0; cell < count; cell++) {
    levels[cell] = hidden?.has(codes[cell]) ? OFF : chosen && !chosen[cell] ? FADED : FULL;
    const share = values && Math.min(Math.max((values[cell] - low) / (high - low), 0), 1);
    const color = colors ? colors.get(codes[cell]) : scale[Math.round(share * (scale.length - 1))];
    pixels[cell] = levels[cell] === OFF ? OFF_PIXEL : levels[cell] === FADED ? mix(0xffffffff, color, 72) : color;
  }
  requestDraw();
}

function colorBy(key) {
  colorField = fields.find((field) => field.key === key);
  element("color-by").value = key;
  const isCategory = colorField.kind === "category";
  element("legend-title").textContent = colorField.title + (colorField.unit ? `, ${colorField.unit}` : "");
  element("all").hidden = element("none").hidden = !isCategory;
  element("legend").replaceChildren(...(isCategory ? categoryLegend() : measureLegend()));
  element("legend-note").textContent = isCategory
    ? "Click hides or shows; Shift + click shows only one."
    : "From the 1st to the 99th percentile; cells beyond have the end's colour.";
  tellSelection();
  recolor();
}

function categoryLegend() {
  const { names, colors, counts, hidden, codes } = colorField;
  const all = [...names.keys()].concat(counts.has(MISSING) ? [MISSING] : []);
  const press = () => {
    [...element("legend").querySelectorAll("button")].forEach((button, i) =>
      button.setAttribute("aria-pressed", String(!hidden.has(all[i]))),
    );
    recolor();
  };
  element("all").onclick = () => (hidden.clear(), press());
  element("none").onclick = () => (all.forEach((code) => hidden.add(code)), press());
  return all.map((code) => {
    const button = make("button");
    button.setAttribute("aria-pressed", String(!hidden.has(code)));
    button.append(make("span", undefined, "swatch"), make("span", names[code] ?? "not given", "name"));
    button.append(make("span", (counts.get(code) ?? 0).toLocaleString("en"), "count"));
    button.firstChild.style.background = colors[code] ?? "#bebebe";
    button.title = names[code] ?? "not given";
    button.onclick = (event) => {
      if (event.shiftKey) {
        all.forEach((other) => hidden.add(other));
        hidden.delete(code);
      } else if (!hidden.delete(code)) {
        hidden.add(code);
      }
      press();
    };
    const item = make("li");
    item.append(button);
    return item;
  });
}

function measureLegend() {
  const bar = make("li", undefined, "bar");
  bar.style.background = `linear-gradient(to right, ${facts.scale.filter((_, i) => i % 15 === 0).join(", ")})`;
  const ticks = make("li", undefined, "ticks");
  const { low, high } = colorField;
  for (const share of [0, 0.25, 0.5, 0.75, 1]) ticks.append(make("span", round(low + share * (high - low))));
  return [bar, ticks];
}

// A cell's image and facts, in an element of class "card".
function fillCard(card, cell) {
  if (!card.firstChild) card.append(make("canvas"), make("dl"));
  const list = card.lastChild;
  list.replaceChildren(make("dd", ids[cell], "id"));
  const row = (name, text) => list.append(make("dt", name), make("dd", text));
  for (const field of fields) {
    const text = told(field, cell);
    if (text !== null) row(field.title, text);
  }
  row("At", `${Math.round(places[2 * cell])}, ${Math.round(places[2 * cell + 1])} px`);
  fitCanvas(card.firstChild, 132, 132);
  drawCard(card, cell);
}

function drawCard(card, cell) {
  if (cell < 0 || !card.firstChild) return;
  const context = card.firstChild.getContext("2d");
  if (!drawCell(context, cell, 0, 0, 132)) return;
  const length = ((5 / facts.thumbnailUmPerPx) * 132) / facts.thumbnailPx;
  context.fillStyle = "#fff";
  context.fillRect(6, 118, length + 2, 7);
  context.fillStyle = "#000";
  context.fillRect(7, 119, length, 5);
  context.font = "11px sans-serif";
  context.lineWidth = 3;
  context.strokeStyle = "#fff";
  context.strokeText("5 µm", 7, 113);
  context.fillText("5 µm", 7, 113);
}

function pin(cell) {
  pinned = cell;
  element("pinned").hidden = cell < 0;
  if (cell >= 0) {
    fillCard(element("pinned-card"), cell);
    galleries.neighbours.show(neighboursOf(cell, 12));
    element("pinned").scrollIntoView({ block: "nearest" });
  }
  requestDraw();
}

function select(cells) {
  selection = cells && cells.length ? cells : null;
  element("selection").hidden = !selection;
  galleries.selection.show(selection ?? []);
  tellSelection();
  recolor();
}

function tellSelection() {
  if (!selection) return;
  element("selected").textContent = `${selection.length.toLocaleString("en")} cells selected`;
  const { kind, title, codes, names, values, unit } = colorField;
  if (kind === "measure") {
    const sorted = Float32Array.from(selection, (cell) => values[cell]).sort();
    const [low, middle, high] = [0.05, 0.5, 0.95].map((share) => round(sorted[Math.floor(share * (sorted.length - 1))]));
    element("makeup").textContent = `${title}: median ${middle} ${unit}, 5 % to 95 %: ${low} to ${high}`;
    return;
  }
  const counts = new Map();
  for (const cell of selection) counts.set(codes[cell], (counts.get(codes[cell]) || 0) + 1);
  const parts = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 6);
  const percent = (n) => Math.round((100 * n) / selection.length) || "<1";
  const words = parts.map(([code, n]) => `${names[code] ?? "not given"}: ${percent(n)} %`);
  element("makeup").textContent = `By ${title.toLowerCase()}: ${words.join("; ")}${counts.size > 6 ? "; ..." : ""}`;
}

// cell_id, and label where one is given: what labels=... of lemon atlas and the probe of lemon pretrain read.
function csvOfSelection() {
  const quote = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const label = element("label").value.trim();
  const rows = selection.map((cell) => quote(ids[cell]) + (label ? `,${quote(label)}` : ""));
  return [label ? "cell_id,label" : "cell_id", ...rows, ""].join("\n");
}

function exportSelection() {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([csvOfSelection()], { type: "text/csv" }));
  link.download = "cells.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
