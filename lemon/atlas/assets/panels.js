// The column beside the map: what colours it, the legend, the selection, the pinned cell. All text is set as text.

let colorField = fields[0];
let selection = null; // cells, ascending but where a list gave their order, or null
let pinned = -1;
let pointed = null; // code of the category under the pointer
const galleries = {
  selection: new Gallery(element("selected-cells"), { columns: 6, size: 46, most: 24, onPick: click }),
  neighbours: new Gallery(element("neighbours"), { columns: 6, size: 46, most: 12, onPick: click }),
  sheet: new Gallery(element("sheet-cells"), {
    columns: 1,
    size: 76,
    most: 240,
    mark: markOnSheet,
    onPick: (cell, event) => {
      click(cell, event);
      if (!isInTurn && !event.ctrlKey && !event.metaKey) element("sheet").close();
    },
  }),
};
const scale = facts.scale.map(pixelOf);

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Whether filters leave a cell in, as a function of the cell.
function filter() {
  const active = fields.filter(({ kind, hidden, range }) => (kind === "category" ? hidden.size : range));
  const isIn = ({ kind, hidden, codes, range, values }, cell) =>
    kind === "category" ? !hidden.has(codes[cell]) : values[cell] >= range[0] && values[cell] <= range[1];
  return (cell) => active.every((field) => isIn(field, cell));
}

// Colours and levels of all points, after any change of field, filters, classes or selection.
function recolor() {
  const { kind, codes, values, low, high } = colorField;
  const colors = kind === "category" ? new Map(colorField.colors.map((hex, code) => [code, pixelOf(hex)])) : null;
  const unknown = pixelOf("#bebebe");
  colors?.set(MISSING, unknown);
  const isShown = filter();
  const chosen = selection && new Uint8Array(count);
  selection?.forEach((cell) => (chosen[cell] = 1));
  let shown = 0;
  for (let cell = 0; cell < count; cell++) {
    const isFaded = (chosen && !chosen[cell]) || (pointed !== null && codes[cell] !== pointed);
    levels[cell] = !isShown(cell) ? OFF : isFaded ? FADED : FULL;
    if (levels[cell] !== OFF) shown++;
    const share = values && Math.min(Math.max((values[cell] - low) / (high - low), 0), 1);
    const color = colors ? colors.get(codes[cell]) : Number.isNaN(share) ? unknown : scale[Math.round(share * (scale.length - 1))];
    pixels[cell] = levels[cell] === OFF ? OFF_PIXEL : levels[cell] === FADED ? mix(0xffffffff, color, 72) : color;
  }
  element("shown").textContent = `${shown.toLocaleString("en")} of ${count.toLocaleString("en")} cells shown`;
  requestDraw();
}

// Everything that the column tells, after a change of what is known of the cells.
function refresh() {
  pointed = null; // its button is made anew
  const isCategory = colorField.kind === "category";
  element("legend-title").textContent = colorField.title + (colorField.unit ? `, ${colorField.unit}` : "");
  element("all").hidden = element("none").hidden = !isCategory;
  element("legend").replaceChildren(...(isCategory ? categoryLegend() : measureLegend()));
  element("legend-note").textContent = isCategory
    ? "Click hides or shows; Shift + click shows only one; pointing shows where its cells are."
    : "Colours from the 1st to the 99th percentile; cells beyond have the end's colour.";
  listFilters();
  listClasses();
  tellSelection();
  tellTurns();
  recolor();
}

function colorBy(key) {
  colorField = fields.find((field) => field.key === key);
  element("color-by").value = key;
  refresh();
}

function countsOf({ codes }) {
  const counts = new Map();
  for (const code of codes) counts.set(code, (counts.get(code) || 0) + 1);
  return counts;
}

function categoryLegend() {
  const { names, colors, hidden } = colorField;
  const counts = countsOf(colorField);
  const all = [...names.keys()].concat(counts.has(MISSING) ? [MISSING] : []);
  const hide = (codes) => {
    remember();
    hidden.clear();
    for (const code of codes) hidden.add(code);
    const at = [...element("legend").querySelectorAll("button")].indexOf(document.activeElement);
    refresh();
    element("legend").querySelectorAll("button")[at]?.focus();
  };
  element("all").onclick = () => hide([]);
  element("none").onclick = () => hide(all);
  return all.map((code) => {
    const button = make("button");
    button.setAttribute("aria-pressed", String(!hidden.has(code)));
    button.append(make("span", undefined, "swatch"), make("span", names[code] ?? "not given", "name"));
    button.append(make("span", (counts.get(code) ?? 0).toLocaleString("en"), "count"));
    button.firstChild.style.background = colors[code] ?? "#bebebe";
    button.title = names[code] ?? "not given";
    button.onclick = (event) => {
      const others = all.filter((other) => other !== code);
      hide(event.shiftKey ? others : hidden.has(code) ? [...hidden].filter((other) => other !== code) : [...hidden, code]);
    };
    button.onpointerenter = () => point(code);
    button.onpointerleave = () => point(null);
    const item = make("li");
    item.append(button);
    return item;
  });
}

// Show where the cells of a category are while the pointer rests on its name.
function point(code) {
  pointed = code;
  recolor();
}

function measureLegend() {
  const bar = make("li", undefined, "bar");
  bar.style.background = `linear-gradient(to right, ${facts.scale.filter((_, i) => i % 15 === 0).join(", ")})`;
  const ticks = make("li", undefined, "ticks");
  const { low, high, range } = colorField;
  for (const share of [0, 0.25, 0.5, 0.75, 1]) ticks.append(make("span", round(low + share * (high - low))));
  const limits = make("li", "Show from ", "limits");
  const inputs = ["From", "To"].map((name, end) => {
    const input = make("input");
    Object.assign(input, { type: "number", step: "any", value: Number.isFinite(range?.[end]) ? range[end] : "" });
    input.setAttribute("aria-label", `${name}: ${colorField.title}`);
    input.onchange = () => {
      remember();
      const [from, to] = inputs.map(({ value }) => (value === "" ? null : Number(value)));
      colorField.range = from === null && to === null ? null : [from ?? -Infinity, to ?? Infinity];
      listFilters();
      recolor();
    };
    return input;
  });
  limits.append(inputs[0], " to ", inputs[1]);
  return [bar, ticks, limits];
}

// A button for each field that hides cells, which ends that.
function listFilters() {
  const buttons = fields.flatMap((field) => {
    const { kind, title, hidden, range, unit } = field;
    if (kind === "category" ? !hidden.size : !range) return [];
    const ends = range?.map((end) => (Number.isFinite(end) ? String(end) : "any"));
    const button = make("button", `${title}: ${range ? `${ends[0]} to ${ends[1]} ${unit}` : `${hidden.size} hidden`} \u2715`);
    button.title = "End this filter";
    button.onclick = () => {
      remember();
      if (range) field.range = null;
      else hidden.clear();
      refresh();
    };
    return [button];
  });
  element("filters").replaceChildren(...buttons);
}

// A cell's image and facts, in an element of class "card".
function fillCard(card, cell) {
  if (!card.firstChild) card.append(make("canvas"), make("dl"));
  const list = card.lastChild;
  list.replaceChildren(make("dd", ids[cell], "id"));
  const row = (name, text) => list.append(make("dt", name), make("dd", text));
  if (foreignIds[cell]) row("Id as given", foreignIds[cell]);
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
    galleries.neighbours.show([]);
    neighboursOf(cell, 12).then((near) => pinned === cell && galleries.neighbours.show(near));
    if (!isInTurn) element("pinned").scrollIntoView({ block: "nearest" });
    if (viewer) goTo(cell);
  }
  requestDraw();
}

// What a click on a cell does: Ctrl takes it into the selection or out of it, else it is pinned.
function click(cell, event) {
  if (cell < 0) return;
  if (!event.ctrlKey && !event.metaKey) return pin(cell);
  const chosen = new Set(selection);
  if (!chosen.delete(cell)) chosen.add(cell);
  select([...chosen].sort((a, b) => a - b));
}

// Change the selection; it can be undone.
function select(cells) {
  if (!cells?.length && !selection) return;
  remember();
  setSelection(cells);
  refresh();
}

function setSelection(cells) {
  selection = cells?.length ? cells : null;
  element("selection").hidden = !selection;
  galleries.selection.show(selection ?? []);
  if (selection && viewer && !selection.some((cell) => slideOf[cell] === slide)) showSlide(slideOf[selection[0]]);
  if (!selection) element("sheet").close();
  else if (isInTurn && !selection.includes(pinned)) beginTurns();
  else if (element("sheet").open) showSheet(sheetStart);
}

function tellSelection() {
  if (!selection) return;
  element("selected").textContent = `${selection.length.toLocaleString("en")} cells selected`;
  const lines = [makeup(colorField)];
  const bySlide = fields.find((field) => field.key === "slide_id");
  if (bySlide && bySlide !== colorField && bySlide.names.length > 1) lines.push(makeup(bySlide));
  element("makeup").textContent = lines.join("\n");
}

// What the selected cells are by a field, in a line.
function makeup({ kind, title, codes, names, values, unit }) {
  if (kind === "measure") {
    const sorted = Float32Array.from(selection, (cell) => values[cell]).filter((value) => !Number.isNaN(value)).sort();
    if (!sorted.length) return `${title}: not known`;
    const [low, middle, high] = [0.05, 0.5, 0.95].map((share) => round(sorted[Math.floor(share * (sorted.length - 1))]));
    return `${title}: median ${middle} ${unit}, 5 % to 95 %: ${low} to ${high}`;
  }
  const counts = countsOf({ codes: selection.map((cell) => codes[cell]) });
  const parts = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 6);
  const percent = (n) => Math.round((100 * n) / selection.length) || "<1";
  const words = parts.map(([code, n]) => `${names[code] ?? "not given"}: ${n.toLocaleString("en")} (${percent(n)} %)`);
  return `By ${title.toLowerCase()}: ${words.join("; ")}${counts.size > 6 ? "; ..." : ""}`;
}

// The whole selection as pages of cells: over the page, or in turns as a part of it.
const A_PAGE = 240;
let sheetStart = 0;

function showSheet(start) {
  sheetStart = Math.min(Math.max(start, 0), Math.floor((selection.length - 1) / A_PAGE) * A_PAGE);
  const sheet = element("sheet");
  if (!sheet.open) isInTurn ? sheet.show() : sheet.showModal();
  const gallery = galleries.sheet;
  gallery.columns = Math.max(Math.floor((gallery.canvas.parentElement.clientWidth - 16) / gallery.size), 1);
  gallery.show(selection.slice(sheetStart, sheetStart + A_PAGE));
  const end = Math.min(sheetStart + A_PAGE, selection.length);
  element("sheet-place").textContent = `${sheetStart + 1} to ${end} of ${selection.length.toLocaleString("en")}`;
  element("sheet-before").hidden = element("sheet-after").hidden = selection.length <= A_PAGE;
}
