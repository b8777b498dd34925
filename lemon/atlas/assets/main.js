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
  if (lassoPath) drawLasso(context);
  if (!performance.getEntriesByName("first-frame").length) performance.mark("first-frame");
}

// Cells instead of points when asked, or when so few are in view that most have a square of their own.
function areCellsShown() {
  const mode = element("show").value;
  if (mode !== "near") return mode === "cells";
  if (camera.scale <= camera.whole * 1.5) return false;
  const [left, top] = [mapX(0) * SIDE, mapY(0) * SIDE];
  const [right, bottom] = [mapX(map.clientWidth) * SIDE, mapY(map.clientHeight) * SIDE];
  const most = (map.clientWidth * map.clientHeight) / 1500;
  let inView = 0;
  for (let cell = 0; cell < count && inView < most; cell++) {
    const [x, y] = [positions[2 * cell], positions[2 * cell + 1]];
    if (levels[cell] !== OFF && x >= left && x <= right && y >= top && y <= bottom) inView++;
  }
  return inView < most;
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
  context.beginPath();
  context.arc(screenX(cell), screenY(cell), radius() + 4, 0, 2 * Math.PI);
  context.lineWidth = width + 2;
  context.strokeStyle = "#fff";
  context.stroke();
  context.lineWidth = width;
  context.strokeStyle = color;
  context.stroke();
}

function drawLasso(context) {
  context.beginPath();
  for (const [x, y] of lassoPath) {
    context.lineTo((x - camera.x) * camera.scale + map.clientWidth / 2, (y - camera.y) * camera.scale + map.clientHeight / 2);
  }
  context.closePath();
  context.fillStyle = "rgba(26, 86, 196, 0.12)";
  context.fill();
  context.setLineDash([5, 4]);
  context.lineWidth = 1.5;
  context.strokeStyle = "#1a56c4";
  context.stroke();
  context.setLineDash([]);
}

function hover(cell, x, y) {
  const card = element("hover");
  if (cell !== hovered) requestDraw();
  card.hidden = cell < 0;
  if (cell >= 0) {
    if (cell !== hovered) fillCard(card, cell);
    const right = x + 18 + card.offsetWidth < map.clientWidth;
    card.style.left = `${right ? x + 18 : Math.max(x - 18 - card.offsetWidth, 0)}px`;
    card.style.top = `${Math.max(Math.min(y - 40, map.clientHeight - card.offsetHeight - 4), 4)}px`;
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
  element("lasso").setAttribute("aria-pressed", String(on));
  map.classList.toggle("lasso", on);
}

const isLassoOn = () => element("lasso").getAttribute("aria-pressed") === "true";
const placeOf = (event) => {
  const box = map.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

map.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || event.target.closest("button")) return;
  map.setPointerCapture(event.pointerId);
  const [x, y] = placeOf(event);
  drag = { x, y, moved: false };
  isHoverFixed = false;
  if (isLassoOn() || event.shiftKey) lassoPath = [[mapX(x), mapY(y)]];
  hover(-1);
});

map.addEventListener("pointermove", (event) => {
  const [x, y] = placeOf(event);
  if (!drag) {
    isHoverFixed = false;
    hover(event.target.closest("button") ? -1 : cellAt(x, y), x, y);
    return;
  }
  drag.moved ||= Math.hypot(x - drag.x, y - drag.y) > 3;
  if (lassoPath) {
    lassoPath.push([mapX(x), mapY(y)]);
  } else if (drag.moved) {
    map.classList.add("dragging");
    pan(x - drag.x, y - drag.y);
    [drag.x, drag.y] = [x, y];
  }
  requestDraw();
});

map.addEventListener("pointerup", (event) => {
  if (!drag) return;
  const { moved } = drag;
  const path = lassoPath;
  drag = lassoPath = null;
  map.classList.remove("dragging");
  if (path && path.length > 2) {
    select(cellsWithin(path));
    setLasso(false);
  } else if (!moved) {
    const cell = cellAt(...placeOf(event));
    if (cell >= 0) pin(cell);
  }
  requestDraw();
});

map.addEventListener("pointercancel", () => {
  drag = lassoPath = null;
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

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    lassoPath = null;
    setLasso(false);
    select(null);
  } else if (event.key.toLowerCase() === "l" && !event.ctrlKey && !event.metaKey && !event.target.closest("input, select")) {
    setLasso(!isLassoOn());
  }
});

element("zoom-in").onclick = () => zoomMiddle(1.6);
element("zoom-out").onclick = () => zoomMiddle(1 / 1.6);
element("whole").onclick = () => (showWhole(), requestDraw());
element("lasso").onclick = () => setLasso(!isLassoOn());
element("in-view").onclick = selectView;
element("clear").onclick = () => select(null);
element("export").onclick = exportSelection;
element("unpin").onclick = () => pin(-1);
element("show").onchange = requestDraw;
element("color-by").onchange = (event) => colorBy(event.target.value);
element("color-by").append(...fields.map((field) => new Option(field.title, field.key)));
element("find").onchange = (event) => {
  const cell = indexOfId.get(event.target.value.trim()) ?? -1;
  element("found").textContent = cell < 0 && event.target.value ? "No cell of this atlas has that id." : "";
  if (cell < 0) return;
  [camera.x, camera.y] = [positions[2 * cell] / SIDE, positions[2 * cell + 1] / SIDE];
  camera.scale = Math.max(camera.scale, camera.whole * 3);
  pin(cell);
};

onSheet = () => {
  drawCard(element("hover"), hovered);
  drawCard(element("pinned-card"), pinned);
  galleries.selection.draw();
  galleries.neighbours.draw();
  if (areCellsShown()) requestDraw();
};
document.addEventListener("DOMContentLoaded", onSheet);
new ResizeObserver(() => (resize(), requestDraw())).observe(map);
resize();
colorBy(fields[0].key);

// For whoever looks in from the console, and for the tests.
window.atlas = { ids, camera, screenX, screenY, draw, squaresInView };
window.atlas.selected = () => selection;
window.atlas.isWaiting = () => busy > 0 || wanted.size > 0; // for cell images
