// A map: a camera, points written into pixels, cells in squares, and which cell is near a place. There are two where
// two encoders are compared; colours, filters and the selection are of both.

const OFF = 0, FADED = 1, FULL = 2; // how a point is drawn, and in this order
const OFF_PIXEL = pixelOf("#e9e9e9");
const levels = new Uint8Array(count).fill(FULL);
const pixels = new Uint32Array(count); // colour of each point
const SMALLEST = 44, LARGEST = 176; // squares with a cell, CSS pixels
const BINS = 128; // a side: cells sorted by place, to find the one near the pointer without asking all

class MapView {
  constructor(pane) {
    const [points, overlay] = pane.querySelectorAll("canvas");
    const camera = { x: 0.5, y: 0.5, scale: 1, whole: 1 }; // centre in map sides; CSS pixels a map side
    const buffer = { width: 0, height: 0, margin: 0, image: null, words: null };
    Object.assign(this, { pane, points, overlay, camera, buffer, positions: null, binStart: null, binned: null });
  }

  screenX = (cell) => (this.positions[2 * cell] / SIDE - this.camera.x) * this.camera.scale + this.pane.clientWidth / 2;
  screenY = (cell) => (this.positions[2 * cell + 1] / SIDE - this.camera.y) * this.camera.scale + this.pane.clientHeight / 2;
  mapX = (x) => (x - this.pane.clientWidth / 2) / this.camera.scale + this.camera.x;
  mapY = (y) => (y - this.pane.clientHeight / 2) / this.camera.scale + this.camera.y;

  // The share of the map's side, which is that of its longer axis, that the cells take along an axis (0 or 1).
  extent(axis) {
    const { positions } = this;
    let low = SIDE, high = 0;
    for (let i = axis; i < positions.length; i += 2) {
      low = Math.min(low, positions[i]);
      high = Math.max(high, positions[i]);
    }
    return Math.max((high - low) / SIDE, 0.05);
  }

  showWhole() {
    const { camera } = this;
    camera.x = camera.y = 0.5;
    camera.scale = camera.whole;
  }

  // At most until cells have about four times the room of the LARGEST, and never so far that none is left in view.
  zoom(factor, x, y) {
    const { camera } = this;
    const before = { ...camera };
    const [left, top] = [this.mapX(x), this.mapY(y)];
    const most = 4 * LARGEST * Math.sqrt(count);
    camera.scale = Math.min(Math.max(camera.scale * factor, camera.whole / 2), most);
    camera.x += left - this.mapX(x);
    camera.y += top - this.mapY(y);
    if (factor > 1 && this.cellsInView(1) < 1) Object.assign(camera, before);
  }

  // Bring a cell to the middle, from near.
  goTo(cell) {
    const { camera, positions } = this;
    [camera.x, camera.y] = [positions[2 * cell] / SIDE, positions[2 * cell + 1] / SIDE];
    camera.scale = Math.max(camera.scale, camera.whole * 3);
  }

  // How many cells that are not hidden are in view, counted up to `most`.
  cellsInView(most) {
    const { pane, positions } = this;
    const [left, top] = [this.mapX(0) * SIDE, this.mapY(0) * SIDE];
    const [right, bottom] = [this.mapX(pane.clientWidth) * SIDE, this.mapY(pane.clientHeight) * SIDE];
    let found = 0;
    for (let cell = 0; cell < count && found < most; cell++) {
      const x = positions[2 * cell], y = positions[2 * cell + 1];
      if (levels[cell] !== OFF && x >= left && x <= right && y >= top && y <= bottom) found++;
    }
    return found;
  }

  pan(dx, dy) {
    const { camera } = this;
    camera.x = Math.min(Math.max(camera.x - dx / camera.scale, 0), 1);
    camera.y = Math.min(Math.max(camera.y - dy / camera.scale, 0), 1);
  }

  resize() {
    const { pane, camera, buffer, points, overlay } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [pane.clientWidth, pane.clientHeight];
    const wasWhole = camera.scale === camera.whole;
    // Room for the buttons above and the help below.
    camera.whole = Math.max(Math.min((width - 60) / this.extent(0), (height - 110) / this.extent(1)), 100);
    if (wasWhole) camera.scale = camera.whole;
    fitCanvas(points, width, height);
    fitCanvas(overlay, width, height);
    // A margin around the screen spares a test a pixel.
    buffer.margin = Math.ceil(14 * ratio);
    buffer.width = points.width + 2 * buffer.margin;
    buffer.height = points.height + 2 * buffer.margin;
    buffer.image = new ImageData(buffer.width, buffer.height);
    buffer.words = new Uint32Array(buffer.image.data.buffer);
  }

  // CSS pixels: about a third of the way to the next point on the whole map; grows more slowly than the map.
  radius() {
    const { camera } = this;
    const apart = camera.whole / Math.sqrt(count);
    return Math.min(Math.max(0.28 * apart, 1.15), 3.2) * Math.min(Math.max(camera.scale / camera.whole, 1) ** 0.4, 3.5);
  }

  // Offsets of a disc's pixels in the buffer, and how much of each it covers (of 256).
  discOf(size) {
    const offsets = [], covers = [], reach = Math.ceil(size);
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        const cover = Math.round(256 * Math.min(Math.max(size + 0.5 - Math.hypot(dx, dy), 0), 1));
        if (cover) {
          offsets.push(dy * this.buffer.width + dx);
          covers.push(cover);
        }
      }
    }
    return { offsets: Int32Array.from(offsets), covers: Uint16Array.from(covers) };
  }

  drawPoints({ empty }) {
    const { pane, camera, positions } = this;
    const ratio = window.devicePixelRatio || 1;
    const { offsets, covers } = this.discOf(this.radius() * ratio);
    const { words, width, height, margin, image } = this.buffer;
    words.fill(0xffffffff);
    const step = (camera.scale * ratio) / SIDE;
    const left = (pane.clientWidth / 2 - camera.x * camera.scale) * ratio + margin;
    const top = (pane.clientHeight / 2 - camera.y * camera.scale) * ratio + margin;
    for (let level = empty ? FULL + 1 : OFF; level <= FULL; level++) {
      for (let cell = count - 1; cell >= 0; cell--) { // the lowest ranks, a random sample, on top
        if (levels[cell] !== level) continue;
        const x = (left + positions[2 * cell] * step) | 0;
        const y = (top + positions[2 * cell + 1] * step) | 0;
        if (x < margin || y < margin || x >= width - margin || y >= height - margin) continue;
        const base = y * width + x;
        for (let i = 0; i < offsets.length; i++) {
          const at = base + offsets[i];
          words[at] = covers[i] === 256 ? pixels[cell] : mix(words[at], pixels[cell], covers[i]);
        }
      }
    }
    this.points.getContext("2d").putImageData(image, -margin, -margin);
  }

  // Cells instead of points when asked, or when so few are in view that most have a square of their own.
  areCellsShown() {
    const { pane, camera } = this;
    const mode = element("show").value;
    if (mode !== "near") return mode === "cells";
    if (camera.scale <= camera.whole * 1.5) return false;
    const most = (pane.clientWidth * pane.clientHeight) / 1500;
    return this.cellsInView(most) < most;
  }

  // Squares of the map, each with the cell nearest its centre: the paper's Figure 4, live. They are fixed to the map, so
  // that moving it changes none, and grow from SMALLEST to LARGEST while there is room around the cells in view.
  squaresInView() {
    const { pane, camera, positions } = this;
    const room = Math.sqrt((pane.clientWidth * pane.clientHeight) / Math.max(this.cellsInView(count), 1)) / 2;
    const side = 2 ** Math.round(Math.log2(Math.min(Math.max(room, SMALLEST), LARGEST) / camera.scale));
    const [left, top] = [Math.floor(this.mapX(0) / side), Math.floor(this.mapY(0) / side)];
    const columns = Math.floor(this.mapX(pane.clientWidth) / side) - left + 1;
    const rows = Math.floor(this.mapY(pane.clientHeight) / side) - top + 1;
    const nearest = new Int32Array(columns * rows).fill(-1);
    const distances = new Float64Array(columns * rows).fill(Infinity);
    for (let cell = 0; cell < count; cell++) {
      if (levels[cell] === OFF) continue;
      const x = positions[2 * cell] / SIDE / side - left;
      const y = positions[2 * cell + 1] / SIDE / side - top;
      const column = Math.floor(x), row = Math.floor(y);
      if (column < 0 || row < 0 || column >= columns || row >= rows) continue;
      const fromMiddle = (x - column - 0.5) ** 2 + (y - row - 0.5) ** 2 + (levels[cell] === FADED ? 1 : 0);
      const distance = cell === pinned ? -1 : fromMiddle; // the pinned cell is seen on every map
      if (distance < distances[row * columns + column]) {
        distances[row * columns + column] = distance;
        nearest[row * columns + column] = cell;
      }
    }
    const found = [];
    nearest.forEach((cell, i) => {
      if (cell < 0) return;
      const x = ((left + (i % columns)) * side - camera.x) * camera.scale + pane.clientWidth / 2;
      const y = ((top + Math.floor(i / columns)) * side - camera.y) * camera.scale + pane.clientHeight / 2;
      found.push({ cell, x, y, size: side * camera.scale });
    });
    return found;
  }

  fillBins() {
    const { positions } = this;
    const binOf = (cell) => Math.min((positions[2 * cell + 1] * BINS) >> 16, BINS - 1) * BINS + ((positions[2 * cell] * BINS) >> 16);
    this.binStart = new Uint32Array(BINS * BINS + 1);
    this.binned = new Uint32Array(count);
    for (let cell = 0; cell < count; cell++) this.binStart[binOf(cell) + 1]++;
    for (let bin = 0; bin < BINS * BINS; bin++) this.binStart[bin + 1] += this.binStart[bin];
    const next = this.binStart.slice();
    for (let cell = 0; cell < count; cell++) this.binned[next[binOf(cell)]++] = cell;
  }

  // The cell that is not hidden and nearest to a place on the screen, within `reach` CSS pixels; -1 for none.
  cellNear(x, y, reach) {
    const clamp = (value) => Math.min(Math.max(Math.floor((value * SIDE * BINS) / 65536), 0), BINS - 1);
    let best = -1, bestDistance = reach * reach;
    for (let row = clamp(this.mapY(y - reach)); row <= clamp(this.mapY(y + reach)); row++) {
      for (let column = clamp(this.mapX(x - reach)); column <= clamp(this.mapX(x + reach)); column++) {
        for (let i = this.binStart[row * BINS + column]; i < this.binStart[row * BINS + column + 1]; i++) {
          const cell = this.binned[i];
          if (levels[cell] === OFF) continue;
          const distance = (this.screenX(cell) - x) ** 2 + (this.screenY(cell) - y) ** 2;
          if (distance < bestDistance) [best, bestDistance] = [cell, distance];
        }
      }
    }
    return best;
  }

  // What a place means: in squares the square's cell, else the nearest point within `reach`.
  cellAt(x, y, reach = Math.max(10, this.radius() + 3)) {
    if (!this.areCellsShown()) return this.cellNear(x, y, reach);
    const square = this.squaresInView().find((s) => x >= s.x && x < s.x + s.size && y >= s.y && y < s.y + s.size);
    return square ? square.cell : -1;
  }

  // The cells inside a polygon on the map; hidden ones are left out.
  cellsWithin(polygon) {
    const { positions } = this;
    return shownCells((cell) => isWithin(polygon, positions[2 * cell] / SIDE, positions[2 * cell + 1] / SIDE));
  }
}

const map = new MapView(element("map"));
const other = facts.against ? new MapView(element("other")) : null; // by the second encoder
const maps = other ? [map, other] : [map];

// `share` of 256 of the pixel `over`, the rest of `under`.
function mix(under, over, share) {
  const redBlue = (under & 0xff00ff) * (256 - share) + (over & 0xff00ff) * share;
  const green = (under & 0xff00) * (256 - share) + (over & 0xff00) * share;
  return (0xff000000 | ((redBlue / 256) & 0xff00ff) | ((green / 256) & 0xff00)) >>> 0;
}

// The `wanted` cells whose embeddings are nearest to that of a cell, itself left out; the nearest first.
async function neighboursOf(cell, wanted) {
  if (facts.served) return (await answerOf(`neighbours?cell=${cell}&k=${wanted}`)).json();
  vectors ??= new Int8Array(await bufferOf("vectors"));
  const width = weights.length, start = cell * width;
  const distances = new Float32Array(count);
  for (let other = 0, at = 0; other < count; other++) {
    let sum = 0;
    for (let i = 0; i < width; i++, at++) {
      const difference = vectors[at] - vectors[start + i];
      sum += weights[i] * difference * difference;
    }
    distances[other] = sum;
  }
  distances[cell] = Infinity;
  const limit = distances.slice().sort()[Math.min(wanted, count) - 1];
  const near = [];
  for (let other = 0; other < count; other++) if (other !== cell && distances[other] <= limit) near.push(other);
  return near.sort((a, b) => distances[a] - distances[b]).slice(0, wanted);
}

// The cells inside a polygon on the slide that is shown; hidden ones are left out.
function cellsWithinTissue(polygon) {
  const isInside = (cell) => levels[cell] !== OFF && isWithin(polygon, places[2 * cell], places[2 * cell + 1]);
  return [...cellsOfSlide[slide].filter(isInside)];
}

function shownCells(condition) {
  const found = [];
  for (let cell = 0; cell < count; cell++) if (levels[cell] !== OFF && condition(cell)) found.push(cell);
  return found;
}

function isWithin(polygon, x, y) {
  let within = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[xi, yi], [xj, yj]] = [polygon[i], polygon[j]];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) within = !within;
  }
  return within;
}
