// Classes that are given in the page, undo, and what is taken out of it.

const past = []; // states before each change, the latest last
const STEPS_KEPT = 100;
let areLabelsUnsaved = false;

// Call before a change of selection, filters or classes.
function remember() {
  const filters = fields.map((field) => (field.kind === "category" ? new Set(field.hidden) : field.range));
  const { codes, names, colors } = classes;
  past.push({ selection, filters, codes, names, colors, pinned });
  if (past.length > STEPS_KEPT) past.shift();
  element("undo").disabled = false;
}

function undo() {
  const state = past.pop();
  element("undo").disabled = !past.length;
  if (!state) return;
  fields.forEach((field, i) => (field[field.kind === "category" ? "hidden" : "range"] = state.filters[i]));
  const { codes, names, colors } = state;
  Object.assign(classes, { codes, names, colors });
  setSelection(state.selection);
  if (isInTurn) takeTurn(state.pinned);
  refresh();
}

// The cells that a label goes to: the selection, else the pinned cell; in turns always the pinned one.
const labelled = () => (isInTurn ? null : selection) ?? (pinned >= 0 ? [pinned] : []);

// Give those cells a class by its number; MISSING takes theirs away.
function giveClass(code) {
  const cells = labelled();
  element("label-note").textContent = cells.length ? "" : "Select cells or pin one first.";
  if (!cells.length) return;
  remember();
  classes.codes = classes.codes.slice(); // the former is in the past
  for (const cell of cells) classes.codes[cell] = code;
  areLabelsUnsaved = true;
  const what = code === MISSING ? "without class" : classes.names[code];
  element("label-note").textContent = isInTurn ? `${ids[cells[0]]}: ${what}` : `${cells.length.toLocaleString("en")} cells: ${what}`;
  refresh();
  if (isInTurn && code !== MISSING) moveTurn(1);
}

function addClass(name) {
  if (classes.names.includes(name)) return;
  remember();
  appendClass(name);
  refresh();
}

function appendClass(name) {
  classes.names = [...classes.names, name];
  classes.colors = [...classes.colors, facts.palette[(classes.names.length - 1) % facts.palette.length]];
}

function listClasses() {
  const counts = countsOf(classes);
  const items = classes.names.map((name, code) => {
    const button = make("button");
    button.append(make("kbd", code < 9 ? String(code + 1) : ""), make("span", undefined, "swatch"));
    button.append(make("span", name, "name"), make("span", (counts.get(code) ?? 0).toLocaleString("en"), "count"));
    button.children[1].style.background = classes.colors[code];
    button.onclick = () => giveClass(code);
    const item = make("li");
    item.append(button);
    return item;
  });
  element("classes").replaceChildren(...items);
}

// The cells that an export is of.
function exported() {
  const what = element("export-what").value;
  if (what === "selection") return selection ?? [];
  return shownCells((cell) => what === "shown" || classes.codes[cell] !== MISSING);
}

const labelOf = (cell) => told(classes, cell) ?? "selected";

// What labels=... of lemon atlas and lemon classify read: a cell without a class is in one called "selected".
function csvOf(cells) {
  const quote = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const foreign = (cell) => (foreignIds.length ? [foreignIds[cell] ?? ""] : []);
  const px = (value) => Math.round(100 * value) / 100;
  const place = (cell) => [facts.slides[slideOf[cell]], px(places[2 * cell]), px(places[2 * cell + 1])];
  const row = (cell) => [ids[cell], labelOf(cell), ...place(cell), ...foreign(cell)];
  const rows = cells.map((cell) => row(cell).map((value) => quote(String(value))).join(","));
  const header = `cell_id,label,slide_id,x_level0_px,y_level0_px${foreignIds.length ? ",foreign_id" : ""}`;
  return [header, ...rows, ""].join("\n");
}

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

// Detections for QuPath, which counts from the corner of the scanned area; of one slide, as it opens one. A nucleus
// that came from there keeps its id.
function geojsonOf(cells) {
  const features = cells.filter((cell) => slideOf[cell] === slide).map((cell) => {
    const code = classes.codes[cell];
    const color = code === MISSING ? "#bebebe" : classes.colors[code];
    const rgb = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
    const classification = { name: labelOf(cell), color: rgb };
    const properties = { objectType: "detection", name: ids[cell], classification };
    const id = UUID.test(foreignIds[cell] ?? "") ? { id: foreignIds[cell] } : {};
    return { type: "Feature", ...id, geometry: geometryOf(cell), properties };
  });
  return JSON.stringify({ type: "FeatureCollection", features });
}

function geometryOf(cell) {
  const [x, y] = [places[2 * cell] - picture.x, places[2 * cell + 1] - picture.y];
  if (!corners[cell]) return { type: "Point", coordinates: [x, y] };
  const step = facts.outlineUm / picture.mpp;
  const ring = [];
  for (let i = 0, at = outlineStart[cell]; i < corners[cell]; i++, at += 2) {
    ring.push([outlines[at], outlines[at + 1]].map((offset, axis) => Math.round(100 * ([x, y][axis] + offset * step)) / 100));
  }
  return { type: "Polygon", coordinates: [ring] };
}

function exportAs(form) {
  const cells = exported();
  const here = form === "csv" ? cells : cells.filter((cell) => slideOf[cell] === slide);
  const where = form === "csv" ? "" : ` of slide ${facts.slides[slide]}`;
  element("export-note").textContent = here.length ? `${here.length.toLocaleString("en")} cells${where} written` : `No such cell${where}.`;
  if (!here.length) return;
  const link = make("a");
  const text = form === "csv" ? csvOf(here) : geojsonOf(here);
  link.href = URL.createObjectURL(new Blob([text], { type: form === "csv" ? "text/csv" : "application/geo+json" }));
  link.download = `cells.${form}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  if (element("export-what").value === "labelled" && form === "csv") areLabelsUnsaved = false;
}

window.addEventListener("beforeunload", (event) => areLabelsUnsaved && event.preventDefault());
