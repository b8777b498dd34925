// Pointer, keys and buttons; and one drawing a frame at most, only after a change.

let hovered = -1;
let isHoverFixed = false; // by keys: the cell at the cross
let lassoPath = null; // [x, y] in map sides while it is drawn
let drag = null;
let active = map; // the map that keys, the lasso and buttons are for
let isDrawDue = false;

function requestDraw() {
  if (isDrawDue) return;
  isDrawDue = true;
  requestAnimationFrame(() => {
    isDrawDue = false;
    draw();
  });
}

function draw() {
  for (const view of maps) if (view.positions && view.pane.clientWidth) drawMap(view);
  drawTissue();
  if (element("sheet").open) galleries.sheet.draw();
  if (!performance.getEntriesByName("first-frame").length) performance.mark("first-frame");
}

function drawMap(view) {
  const { pane, camera } = view;
  const inSquares = view.areCellsShown();
  view.drawPoints({ empty: inSquares });
  const context = view.overlay.getContext("2d");
  context.clearRect(0, 0, pane.clientWidth, pane.clientHeight);
  if (inSquares) drawSquares(context, view);
  if (isHoverFixed && view === active) drawCross(context, view);
  if (pinned >= 0 && !inSquares) ring(context, view, pinned, "#000", 3);
  if (hovered >= 0 && !inSquares) ring(context, view, hovered, "#1a56c4", 2);
  if (!lassoPath || view !== active) return;
  drawPath(context, lassoPath.map(([x, y]) => [(x - camera.x) * camera.scale + pane.clientWidth / 2, (y - camera.y) * camera.scale + pane.clientHeight / 2]));
}

function drawSquares(context, view) {
  for (const { cell, x, y, size } of view.squaresInView()) {
    context.fillStyle = hexOf(pixels[cell]);
    context.fillRect(x + 1, y + 1, size - 2, size - 2);
    context.globalAlpha = levels[cell] === FADED ? 0.4 : 1;
    if (!drawCell(context, cell, x + 3, y + 3, size - 6)) {
      context.fillStyle = "#eee";
      context.fillRect(x + 3, y + 3, size - 6, size - 6);
    }
    context.globalAlpha = 1;
    if (cell === pinned || cell === hovered) {
      context.lineWidth = 3;
      context.strokeStyle = cell === pinned ? "#000" : "#1a56c4";
      context.strokeRect(x + 1, y + 1, size - 2, size - 2);
    }
  }
}

function drawCross(context, { pane }) {
  const [x, y] = [pane.clientWidth / 2, pane.clientHeight / 2];
  context.strokeStyle = "#000";
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(x - 9, y);
  context.lineTo(x + 9, y);
  context.moveTo(x, y - 9);
  context.lineTo(x, y + 9);
  context.stroke();
}

function ring(context, view, cell, color, width) {
  ringAt(context, view.screenX(cell), view.screenY(cell), view.radius() + 4, color, width);
}

function ringAt(context, x, y, size, color, width) {
  context.beginPath();
  context.arc(x, y, size, 0, 2 * Math.PI);
  context.lineWidth = width + 2;
  context.strokeStyle = "#fff";
  context.stroke();
  context.lineWidth = width;
  context.strokeStyle = color;
  context.stroke();
}

// A lasso, of [x, y] in CSS pixels.
function drawPath(context, path) {
  context.beginPath();
  for (const [x, y] of path) context.lineTo(x, y);
  context.closePath();
  context.fillStyle = "rgba(26, 86, 196, 0.12)";
  context.fill();
  context.setLineDash([5, 4]);
  context.lineWidth = 1.5;
  context.strokeStyle = "#1a56c4";
  context.stroke();
  context.setLineDash([]);
}

// The cell under the pointer, which is at x, y of `pane`: its card is there, and it has a ring in every pane.
function hover(cell, x, y, pane = map.pane) {
  const card = element("hover");
  if (cell !== hovered) requestDraw();
  card.hidden = cell < 0;
  if (cell >= 0) {
    if (cell !== hovered) fillCard(card, cell);
    if (card.parentElement !== pane) pane.append(card);
    const right = x + 18 + card.offsetWidth < pane.clientWidth;
    card.style.left = `${right ? x + 18 : Math.max(x - 18 - card.offsetWidth, 0)}px`;
    card.style.top = `${Math.max(Math.min(y - 40, pane.clientHeight - card.offsetHeight - 4), 4)}px`;
  }
  hovered = cell;
}

function setLasso(on) {
  for (const id of ["lasso", "other-lasso", "slide-lasso"]) element(id).setAttribute("aria-pressed", String(on));
  for (const pane of [...maps.map((view) => view.pane), tissue]) pane.classList.toggle("lasso", on);
}

const isLassoOn = () => element("lasso").getAttribute("aria-pressed") === "true";

// Ctrl adds to what is selected.
function endLasso(cells, event) {
  const isMore = selection && (event.ctrlKey || event.metaKey);
  select(isMore ? [...new Set([...selection, ...cells])].sort((a, b) => a - b) : cells);
  setLasso(false);
}

const placeOf = (event, { pane }) => {
  const box = pane.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
const fingers = new Map(); // pointers that are down -> their places

function beginDrag(event, view) {
  if (event.button !== 0 || event.target.closest("button")) return;
  active = view;
  view.pane.setPointerCapture(event.pointerId);
  const [x, y] = placeOf(event, view);
  fingers.set(event.pointerId, [x, y]);
  drag = { x, y, moved: fingers.size > 1 };
  isHoverFixed = false;
  lassoPath = fingers.size === 1 && (isLassoOn() || event.shiftKey) ? [[view.mapX(x), view.mapY(y)]] : null;
  hover(-1);
}

function moveOver(event, view) {
  const [x, y] = placeOf(event, view);
  if (!drag) {
    isHoverFixed = false;
    hover(event.target.closest("button") ? -1 : view.cellAt(x, y), x, y, view.pane);
    return;
  }
  const before = [...fingers.values()];
  fingers.set(event.pointerId, [x, y]);
  drag.moved ||= Math.hypot(x - drag.x, y - drag.y) > 3;
  if (lassoPath) {
    lassoPath.push([view.mapX(x), view.mapY(y)]);
  } else if (fingers.size === 2) {
    pinch(view, before, [...fingers.values()]);
  } else if (drag.moved) {
    view.pane.classList.add("dragging");
    view.pan(x - drag.x, y - drag.y);
    [drag.x, drag.y] = [x, y];
  }
  requestDraw();
}

// Two fingers move, and zoom by how far they are apart.
function pinch(view, before, now) {
  const middle = ([a, b]) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
  const apart = ([a, b]) => Math.max(Math.hypot(a[0] - b[0], a[1] - b[1]), 1);
  const [[x0, y0], [x1, y1]] = [middle(before), middle(now)];
  view.pan(x1 - x0, y1 - y0);
  view.zoom(apart(now) / apart(before), x1, y1);
}

function endDrag(event, view) {
  if (!drag) return;
  fingers.delete(event.pointerId);
  const { moved } = drag;
  const path = lassoPath;
  lassoPath = null;
  const [rest] = fingers.values();
  drag = rest ? { x: rest[0], y: rest[1], moved: true } : null;
  view.pane.classList.remove("dragging");
  if (path && path.length > 2) endLasso(view.cellsWithin(path), event);
  else if (!moved) click(view.cellAt(...placeOf(event, view)), event);
  requestDraw();
}

function zoomByWheel(event, view) {
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 16 : 1;
  view.zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0016)), ...placeOf(event, view));
  hover(-1);
  requestDraw();
}

function selectView() {
  const { pane } = map;
  const [left, top, right, bottom] = [map.mapX(0), map.mapY(0), map.mapX(pane.clientWidth), map.mapY(pane.clientHeight)];
  select(map.cellsWithin([[left, top], [right, top], [right, bottom], [left, bottom]]));
}

function zoomMiddle(factor, view = map) {
  view.zoom(factor, view.pane.clientWidth / 2, view.pane.clientHeight / 2);
  requestDraw();
}

const keys = {
  ArrowLeft: (view) => view.pan(60, 0),
  ArrowRight: (view) => view.pan(-60, 0),
  ArrowUp: (view) => view.pan(0, 60),
  ArrowDown: (view) => view.pan(0, -60),
  "+": (view) => zoomMiddle(1.4, view),
  "=": (view) => zoomMiddle(1.4, view),
  "-": (view) => zoomMiddle(1 / 1.4, view),
  0: (view) => view.showWhole(),
  Home: (view) => view.showWhole(),
  Enter: () => hovered >= 0 && pin(hovered),
};

function moveByKey(event, view) {
  if (event.target !== view.pane || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  active = view;
  keys[event.key](view);
  const [x, y] = [view.pane.clientWidth / 2, view.pane.clientHeight / 2];
  isHoverFixed = true;
  hover(view.cellAt(x, y, 40), x, y, view.pane);
  requestDraw();
}

for (const view of maps) {
  const { pane } = view;
  pane.addEventListener("pointerdown", (event) => beginDrag(event, view));
  pane.addEventListener("pointermove", (event) => moveOver(event, view));
  pane.addEventListener("pointerup", (event) => endDrag(event, view));
  pane.addEventListener("pointercancel", () => {
    drag = lassoPath = null;
    fingers.clear();
    requestDraw();
  });
  pane.addEventListener("pointerleave", () => drag || hover(-1));
  pane.addEventListener("wheel", (event) => zoomByWheel(event, view), { passive: false });
  pane.addEventListener("keydown", (event) => moveByKey(event, view));
}

const zoomTissue = (factor) => (viewer.viewport.zoomBy(factor), viewer.viewport.applyConstraints());
const panTissue = (x, y) => (viewer.viewport.panBy(viewer.viewport.deltaPointsFromPixels(new OpenSeadragon.Point(x, y))), viewer.viewport.applyConstraints());
const tissueKeys = {
  ArrowLeft: () => panTissue(-60, 0),
  ArrowRight: () => panTissue(60, 0),
  ArrowUp: () => panTissue(0, -60),
  ArrowDown: () => panTissue(0, 60),
  "+": () => zoomTissue(1.4),
  "=": () => zoomTissue(1.4),
  "-": () => zoomTissue(1 / 1.4),
  0: () => viewer.viewport.goHome(),
  Home: () => viewer.viewport.goHome(),
};

tissue.addEventListener("keydown", (event) => {
  if (event.target !== tissue || event.ctrlKey || event.metaKey || event.altKey || !(event.key in tissueKeys)) return;
  event.preventDefault();
  if (isTissueThere()) tissueKeys[event.key]();
});

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select") || event.altKey) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") event.preventDefault(), undo();
  } else if (event.key === "Escape") {
    lassoPath = tissuePath = null;
    setLasso(false);
    if (isInTurn) element("sheet").close();
    else if (!element("sheet").open) select(null);
  } else if (key === "l") {
    setLasso(!isLassoOn());
  } else if (/^[1-9]$/.test(key) && Number(key) <= classes.names.length) {
    giveClass(Number(key) - 1);
  } else if (key === "backspace" || key === "delete") {
    giveClass(MISSING);
  } else if (isInTurn && event.key in turnKeys && !event.target.closest(".map, #tissue")) {
    event.preventDefault();
    moveTurn(turnKeys[event.key]);
  }
});
const turnKeys = { ArrowLeft: -1, ArrowRight: 1 };

function showPanes(which) {
  document.body.dataset.panes = which;
  for (const button of element("panes").children) button.setAttribute("aria-pressed", String(button.value === which));
  hover(-1);
}

element("zoom-in").onclick = () => zoomMiddle(1.6);
element("zoom-out").onclick = () => zoomMiddle(1 / 1.6);
element("whole").onclick = () => (map.showWhole(), requestDraw());
element("other-in").onclick = () => zoomMiddle(1.6, other);
element("other-out").onclick = () => zoomMiddle(1 / 1.6, other);
element("other-whole").onclick = () => (other.showWhole(), requestDraw());
element("lasso").onclick = element("other-lasso").onclick = element("slide-lasso").onclick = () => setLasso(!isLassoOn());
element("in-view").onclick = selectView;
element("clear").onclick = () => select(null);
element("undo").onclick = undo;
element("unpin").onclick = () => pin(-1);
element("select-like").onclick = async () => {
  const cell = pinned;
  select([cell, ...(await neighboursOf(cell, 50))].sort((a, b) => a - b));
};
element("show").onchange = requestDraw;
element("color-by").onchange = (event) => colorBy(event.target.value);
element("color-by").append(...fields.map((field) => new Option(field.title, field.key)));
element("find").onchange = (event) => {
  const id = event.target.value.trim();
  const cell = ids.includes(id) ? ids.indexOf(id) : foreignIds.indexOf(id);
  element("found").textContent = cell < 0 && event.target.value ? "No cell of this atlas has that id." : "";
  if (cell < 0) return;
  for (const view of maps) view.goTo(cell);
  pin(cell);
};
element("new-class").onchange = (event) => {
  const name = event.target.value.trim();
  if (!name) return;
  addClass(name);
  event.target.value = "";
  if (isInTurn) element("sheet").focus(); // so that keys are those of classes again
};
element("no-class").onclick = () => giveClass(MISSING);
element("export-csv").onclick = () => exportAs("csv");
element("export-geojson").onclick = () => exportAs("geojson");
element("open-sheet").onclick = () => showSheet(0);
element("one-by-one").onclick = beginTurns;
element("turn-export").onclick = () => {
  element("export-what").value = "labelled";
  exportAs("csv");
};
element("sheet").onclose = endTurns;
window.onresize = () => element("sheet").open && showSheet(sheetStart);
element("sheet-before").onclick = () => showSheet(sheetStart - A_PAGE);
element("sheet-after").onclick = () => showSheet(sheetStart + A_PAGE);
element("sheet-close").onclick = () => element("sheet").close();
element("slide-name").onchange = (event) => showSlide(Number(event.target.value));
element("slide-whole").onclick = () => viewer.viewport.goHome();
element("slide-in").onclick = () => zoomTissue(1.6);
element("slide-out").onclick = () => zoomTissue(1 / 1.6);
element("cells-on-slide").onchange = drawTissue;
for (const button of element("panes").children) button.onclick = () => showPanes(button.value);

onSheet = () => {
  drawCard(element("hover"), hovered);
  drawCard(element("pinned-card"), pinned);
  for (const gallery of Object.values(galleries)) gallery.draw();
  if (maps.some((view) => view.areCellsShown())) requestDraw();
};

// The map first; what a click, a filter or the slide needs is read while it is there to be looked at.
async function start() {
  await readFirst();
  new ResizeObserver(() => (map.resize(), requestDraw())).observe(map.pane);
  new ResizeObserver(drawTissue).observe(tissue);
  map.resize();
  colorBy(fields[0].key);
  await readRest();
  map.fillBins();
  if (other) showOther();
  openSlides();
  document.body.inert = false;
  if (facts.list) openList(facts.list);
}

function showOther() {
  other.fillBins();
  other.resize();
  new ResizeObserver(() => (other.resize(), requestDraw())).observe(other.pane);
  element("map-note").textContent = facts.against.names[0];
  element("other-note").textContent = facts.against.names[1];
  element("against").hidden = false;
  element("overlap").textContent = facts.against.told;
  element("least").onclick = () => {
    const { values } = fields.find((field) => field.key === "overlap");
    const least = shownCells(() => true).sort((a, b) => values[a] - values[b]).slice(0, A_PAGE);
    select(least);
    if (least.length) showSheet(0);
  };
}

function openSlides() {
  const { areSlidesThere } = facts;
  const panes = areSlidesThere ? ["map", "both", "tissue"] : ["map"];
  if (other) panes.splice(1, 0, "maps");
  for (const button of element("panes").children) button.hidden = !panes.includes(button.value);
  element("panes").hidden = panes.length < 2;
  element("export-geojson").hidden = !areSlidesThere;
  const single = facts.list && areSlidesThere ? "tissue" : "map"; // what is around a cell helps to label it
  showPanes(window.innerWidth < 800 || panes.length < 2 ? single : other && !facts.list ? "maps" : "both");
  if (!areSlidesThere) return;
  element("slide-name").append(...facts.slides.map((name, i) => new Option(`${name} (${cellsOfSlide[i].length.toLocaleString("en")})`, i)));
  openViewer();
  showSlide(0);
}

// For whoever looks in from the console, and for the tests.
window.atlas = { map, other, draw, tissuePlace, neighboursOf };
window.atlas.ids = () => ids;
window.atlas.isRead = () => isRead;
window.atlas.selected = () => selection;
window.atlas.isWaiting = () => busy > 0 || wanted.size > 0; // for cell images
window.atlas.isTissueThere = () => isTissueThere();
start();
