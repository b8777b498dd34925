// Pointer, keys and buttons; and one drawing a frame at most, only after a change.

let hovered = -1;
let isHoverFixed = false; // by keys: the cell at the cross
let lassoPath = null; // [x, y] in map sides while it is drawn
let drag = null;
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
  const inSquares = areCellsShown();
  drawPoints({ empty: inSquares });
  const context = element("overlay").getContext("2d");
  context.clearRect(0, 0, map.clientWidth, map.clientHeight);
  if (inSquares) drawSquares(context);
  if (isHoverFixed) drawCross(context);
  if (pinned >= 0 && !inSquares) ring(context, pinned, "#000", 3);
  if (hovered >= 0 && !inSquares) ring(context, hovered, "#1a56c4", 2);
  if (lassoPath) drawPath(context, lassoPath.map(([x, y]) => [(x - camera.x) * camera.scale + map.clientWidth / 2, (y - camera.y) * camera.scale + map.clientHeight / 2]));
  drawTissue();
  if (!performance.getEntriesByName("first-frame").length) performance.mark("first-frame");
}

// Cells instead of points when asked, or when so few are in view that most have a square of their own.
function areCellsShown() {
  const mode = element("show").value;
  if (mode !== "near") return mode === "cells";
  if (camera.scale <= camera.whole * 1.5) return false;
  const most = (map.clientWidth * map.clientHeight) / 1500;
  return cellsInView(most) < most;
}

function drawSquares(context) {
  for (const { cell, x, y, size } of squaresInView()) {
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

function drawCross(context) {
  const [x, y] = [map.clientWidth / 2, map.clientHeight / 2];
  context.strokeStyle = "#000";
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(x - 9, y);
  context.lineTo(x + 9, y);
  context.moveTo(x, y - 9);
  context.lineTo(x, y + 9);
  context.stroke();
}

function ring(context, cell, color, width) {
  ringAt(context, screenX(cell), screenY(cell), radius() + 4, color, width);
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

// The cell under the pointer, which is at x, y of `pane`: its card is there, and it has a ring in both panes.
function hover(cell, x, y, pane = map) {
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

// What a place means: in squares the square's cell, else the nearest point within `reach`.
function cellAt(x, y, reach = Math.max(10, radius() + 3)) {
  if (!areCellsShown()) return cellNear(x, y, reach);
  const square = squaresInView().find((s) => x >= s.x && x < s.x + s.size && y >= s.y && y < s.y + s.size);
  return square ? square.cell : -1;
}

function setLasso(on) {
  for (const id of ["lasso", "slide-lasso"]) element(id).setAttribute("aria-pressed", String(on));
  for (const pane of [map, tissue]) pane.classList.toggle("lasso", on);
}

const isLassoOn = () => element("lasso").getAttribute("aria-pressed") === "true";

// Ctrl adds to what is selected.
function endLasso(cells, event) {
  const isMore = selection && (event.ctrlKey || event.metaKey);
  select(isMore ? [...new Set([...selection, ...cells])].sort((a, b) => a - b) : cells);
  setLasso(false);
}

const placeOf = (event) => {
  const box = map.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
const fingers = new Map(); // pointers that are down -> their places

map.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || event.target.closest("button")) return;
  map.setPointerCapture(event.pointerId);
  const [x, y] = placeOf(event);
  fingers.set(event.pointerId, [x, y]);
  drag = { x, y, moved: fingers.size > 1 };
  isHoverFixed = false;
  lassoPath = fingers.size === 1 && (isLassoOn() || event.shiftKey) ? [[mapX(x), mapY(y)]] : null;
  hover(-1);
});

map.addEventListener("pointermove", (event) => {
  const [x, y] = placeOf(event);
  if (!drag) {
    isHoverFixed = false;
    hover(event.target.closest("button") ? -1 : cellAt(x, y), x, y);
    return;
  }
  const before = [...fingers.values()];
  fingers.set(event.pointerId, [x, y]);
  drag.moved ||= Math.hypot(x - drag.x, y - drag.y) > 3;
  if (lassoPath) {
    lassoPath.push([mapX(x), mapY(y)]);
  } else if (fingers.size === 2) {
    pinch(before, [...fingers.values()]);
  } else if (drag.moved) {
    map.classList.add("dragging");
    pan(x - drag.x, y - drag.y);
    [drag.x, drag.y] = [x, y];
  }
  requestDraw();
});

// Two fingers move, and zoom by how far they are apart.
function pinch(before, now) {
  const middle = ([a, b]) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
  const apart = ([a, b]) => Math.max(Math.hypot(a[0] - b[0], a[1] - b[1]), 1);
  const [[x0, y0], [x1, y1]] = [middle(before), middle(now)];
  pan(x1 - x0, y1 - y0);
  zoom(apart(now) / apart(before), x1, y1);
}

map.addEventListener("pointerup", (event) => {
  if (!drag) return;
  fingers.delete(event.pointerId);
  const { moved } = drag;
  const path = lassoPath;
  lassoPath = null;
  const [rest] = fingers.values();
  drag = rest ? { x: rest[0], y: rest[1], moved: true } : null;
  map.classList.remove("dragging");
  if (path && path.length > 2) endLasso(cellsWithin(path), event);
  else if (!moved) click(cellAt(...placeOf(event)), event);
  requestDraw();
});

map.addEventListener("pointercancel", () => {
  drag = lassoPath = null;
  fingers.clear();
  requestDraw();
});
map.addEventListener("pointerleave", () => drag || hover(-1));

map.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    const [x, y] = placeOf(event);
    zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0016)), x, y);
    hover(-1);
    requestDraw();
  },
  { passive: false },
);

function selectView() {
  const [left, top] = [mapX(0), mapY(0)];
  const [right, bottom] = [mapX(map.clientWidth), mapY(map.clientHeight)];
  select(cellsWithin([[left, top], [right, top], [right, bottom], [left, bottom]]));
}

function zoomMiddle(factor) {
  zoom(factor, map.clientWidth / 2, map.clientHeight / 2);
  requestDraw();
}

const keys = {
  ArrowLeft: () => pan(60, 0),
  ArrowRight: () => pan(-60, 0),
  ArrowUp: () => pan(0, 60),
  ArrowDown: () => pan(0, -60),
  "+": () => zoomMiddle(1.4),
  "=": () => zoomMiddle(1.4),
  "-": () => zoomMiddle(1 / 1.4),
  0: showWhole,
  Home: showWhole,
  Enter: () => hovered >= 0 && pin(hovered),
};

map.addEventListener("keydown", (event) => {
  if (event.target !== map || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
  const [x, y] = [map.clientWidth / 2, map.clientHeight / 2];
  isHoverFixed = true;
  hover(cellAt(x, y, 40), x, y);
  requestDraw();
});

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
    if (!element("sheet").open) select(null);
  } else if (key === "l") {
    setLasso(!isLassoOn());
  } else if (/^[1-9]$/.test(key) && Number(key) <= classes.names.length) {
    giveClass(Number(key) - 1);
  } else if (key === "backspace" || key === "delete") {
    giveClass(MISSING);
  }
});

function showPanes(which) {
  document.body.dataset.panes = which;
  for (const button of element("panes").children) button.setAttribute("aria-pressed", String(button.value === which));
  hover(-1);
}

element("zoom-in").onclick = () => zoomMiddle(1.6);
element("zoom-out").onclick = () => zoomMiddle(1 / 1.6);
element("whole").onclick = () => (showWhole(), requestDraw());
element("lasso").onclick = element("slide-lasso").onclick = () => setLasso(!isLassoOn());
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
  const cell = ids.indexOf(event.target.value.trim());
  element("found").textContent = cell < 0 && event.target.value ? "No cell of this atlas has that id." : "";
  if (cell < 0) return;
  [camera.x, camera.y] = [positions[2 * cell] / SIDE, positions[2 * cell + 1] / SIDE];
  camera.scale = Math.max(camera.scale, camera.whole * 3);
  pin(cell);
};
element("new-class").onchange = (event) => {
  const name = event.target.value.trim();
  if (!name) return;
  addClass(name);
  event.target.value = "";
};
element("no-class").onclick = () => giveClass(MISSING);
element("export-csv").onclick = () => exportAs("csv");
element("export-geojson").onclick = () => exportAs("geojson");
element("open-sheet").onclick = () => showSheet(0);
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
  if (areCellsShown()) requestDraw();
};

// The map first; what a click, a filter or the slide needs is read while it is there to be looked at.
async function start() {
  await readFirst();
  new ResizeObserver(() => (resize(), requestDraw())).observe(map);
  new ResizeObserver(drawTissue).observe(tissue);
  resize();
  colorBy(fields[0].key);
  await readRest();
  fillBins();
  openSlides();
  document.body.inert = false;
}

function openSlides() {
  element("panes").hidden = element("export-geojson").hidden = !facts.areSlidesThere;
  if (!facts.areSlidesThere) return showPanes("map");
  element("slide-name").append(...facts.slides.map((name, i) => new Option(`${name} (${cellsOfSlide[i].length.toLocaleString("en")})`, i)));
  showPanes(window.innerWidth < 800 ? "map" : "both");
  openViewer();
  showSlide(0);
}

// For whoever looks in from the console, and for the tests.
window.atlas = { camera, screenX, screenY, draw, squaresInView, tissuePlace, neighboursOf };
window.atlas.ids = () => ids;
window.atlas.isRead = () => isRead;
window.atlas.selected = () => selection;
window.atlas.isWaiting = () => busy > 0 || wanted.size > 0; // for cell images
window.atlas.isTissueThere = () => isTissueThere();
start();
