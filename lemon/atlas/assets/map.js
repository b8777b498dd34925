// The map: a camera, points written into pixels, cells in squares, and which cell is near a place.

const OFF = 0, FADED = 1, FULL = 2; // how a point is drawn, and in this order
const OFF_PIXEL = pixelOf("#e9e9e9");
const levels = new Uint8Array(count).fill(FULL);
const pixels = new Uint32Array(count); // colour of each point
const SMALLEST = 44, LARGEST = 176; // squares with a cell, CSS pixels
const map = element("map");
const camera = { x: 0.5, y: 0.5, scale: 1, whole: 1 }; // centre in map sides; CSS pixels a map side
const buffer = { width: 0, height: 0, margin: 0, image: null, words: null };

const screenX = (cell) => (positions[2 * cell] / SIDE - camera.x) * camera.scale + map.clientWidth / 2;
const screenY = (cell) => (positions[2 * cell + 1] / SIDE - camera.y) * camera.scale + map.clientHeight / 2;
const mapX = (x) => (x - map.clientWidth / 2) / camera.scale + camera.x;
const mapY = (y) => (y - map.clientHeight / 2) / camera.scale + camera.y;

// The share of the map's side, which is that of its longer axis, that the cells take along an axis (0 or 1).
function extent(axis) {
  let low = SIDE, high = 0;
  for (let i = axis; i < positions.length; i += 2) {
    low = Math.min(low, positions[i]);
    high = Math.max(high, positions[i]);
  }
  return Math.max((high - low) / SIDE, 0.05);
}

function showWhole() {
  camera.x = camera.y = 0.5;
  camera.scale = camera.whole;
}

// At most until cells have about four times the room of the LARGEST, and never so far that none is left in view.
function zoom(factor, x, y) {
  const before = { ...camera };
  const [left, top] = [mapX(x), mapY(y)];
  const most = 4 * LARGEST * Math.sqrt(count);
  camera.scale = Math.min(Math.max(camera.scale * factor, camera.whole / 2), most);
  camera.x += left - mapX(x);
  camera.y += top - mapY(y);
  if (factor > 1 && cellsInView(1) < 1) Object.assign(camera, before);
}

// How many cells that are not hidden are in view, counted up to `most`.
function cellsInView(most) {
  const [left, top] = [mapX(0) * SIDE, mapY(0) * SIDE];
  const [right, bottom] = [mapX(map.clientWidth) * SIDE, mapY(map.clientHeight) * SIDE];
  let found = 0;
  for (let cell = 0; cell < count && found < most; cell++) {
    const [x, y] = [positions[2 * cell], positions[2 * cell + 1]];
    if (levels[cell] !== OFF && x >= left && x <= right && y >= top && y <= bottom) found++;
  }
  return found;
}

function pan(dx, dy) {
  camera.x = Math.min(Math.max(camera.x - dx / camera.scale, 0), 1);
  camera.y = Math.min(Math.max(camera.y - dy / camera.scale, 0), 1);
}

function resize() {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [map.clientWidth, map.clientHeight];
  const wasWhole = camera.scale === camera.whole;
  // Room for the buttons above and the help below.
  camera.whole = Math.max(Math.min((width - 60) / extent(0), (height - 110) / extent(1)), 100);
  if (wasWhole) camera.scale = camera.whole;
  fitCanvas(element("points"), width, height);
  fitCanvas(element("overlay"), width, height);
  // A margin around the screen spares a test a pixel.
  buffer.margin = Math.ceil(14 * ratio);
  buffer.width = element("points").width + 2 * buffer.margin;
  buffer.height = element("points").height + 2 * buffer.margin;
  buffer.image = new ImageData(buffer.width, buffer.height);
  buffer.words = new Uint32Array(buffer.image.data.buffer);
}

// CSS pixels: about a third of the way to the next point on the whole map; grows more slowly than the map.
function radius() {
  const apart = camera.whole / Math.sqrt(count);
  return Math.min(Math.max(0.28 * apart, 1.15), 3.2) * Math.min(Math.max(camera.scale / camera.whole, 1) ** 0.4, 3.5);
}

// Offsets of a disc's pixels in the buffer, and how much of each it covers (of 256).
function discOf(size) {
  const offsets = [], covers = [], reach = Math.ceil(size);
  for (let dy = -reach; dy <= reach; dy++) {
    for (let dx = -reach; dx <= reach; dx++) {
      const cover = Math.round(256 * Math.min(Math.max(size + 0.5 - Math.hypot(dx, dy), 0), 1));
      if (cover) {
        offsets.push(dy * buffer.width + dx);
        covers.push(cover);
      }
    }
  }
  return { offsets: Int32Array.from(offsets), covers: Uint16Array.from(covers) };
}

function drawPoints({ empty }) {
  const ratio = window.devicePixelRatio || 1;
  const { offsets, covers } = discOf(radius() * ratio);
  const { words, width, height, margin } = buffer;
  words.fill(0xffffffff);
  const step = (camera.scale * ratio) / SIDE;
  const left = (map.clientWidth / 2 - camera.x * camera.scale) * ratio + margin;
  const top = (map.clientHeight / 2 - camera.y * camera.scale) * ratio + margin;
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
  element("points").getContext("2d").putImageData(buffer.image, -margin, -margin);
}

// `share` of 256 of the pixel `over`, the rest of `under`.
function mix(under, over, share) {
  const redBlue = (under & 0xff00ff) * (256 - share) + (over & 0xff00ff) * share;
  const green = (under & 0xff00) * (256 - share) + (over & 0xff00) * share;
  return (0xff000000 | ((redBlue / 256) & 0xff00ff) | ((green / 256) & 0xff00)) >>> 0;
}

// Squares of the map, each with the cell nearest its centre: the paper's Figure 4, live. They are fixed to the map, so
// that moving it changes none, and grow from SMALLEST to LARGEST while there is room around the cells in view.
function squaresInView() {
  const room = Math.sqrt((map.clientWidth * map.clientHeight) / Math.max(cellsInView(count), 1)) / 2;
  const side = 2 ** Math.round(Math.log2(Math.min(Math.max(room, SMALLEST), LARGEST) / camera.scale));
  const [left, top] = [Math.floor(mapX(0) / side), Math.floor(mapY(0) / side)];
  const columns = Math.floor(mapX(map.clientWidth) / side) - left + 1;
  const rows = Math.floor(mapY(map.clientHeight) / side) - top + 1;
  const nearest = new Int32Array(columns * rows).fill(-1);
  const distances = new Float64Array(columns * rows).fill(Infinity);
  for (let cell = 0; cell < count; cell++) {
    if (levels[cell] === OFF) continue;
    const x = positions[2 * cell] / SIDE / side - left;
    const y = positions[2 * cell + 1] / SIDE / side - top;
    const [column, row] = [Math.floor(x), Math.floor(y)];
    if (column < 0 || row < 0 || column >= columns || row >= rows) continue;
    const distance = (x - column - 0.5) ** 2 + (y - row - 0.5) ** 2 + (levels[cell] === FADED ? 1 : 0);
    if (distance < distances[row * columns + column]) {
      distances[row * columns + column] = distance;
      nearest[row * columns + column] = cell;
    }
  }
  const found = [];
  nearest.forEach((cell, i) => {
    if (cell < 0) return;
    const x = ((left + (i % columns)) * side - camera.x) * camera.scale + map.clientWidth / 2;
    const y = ((top + Math.floor(i / columns)) * side - camera.y) * camera.scale + map.clientHeight / 2;
    found.push({ cell, x, y, size: side * camera.scale });
  });
  return found;
}

// Cells sorted into squares of the map, to find the one near the pointer without asking all.
const BINS = 128;
const binOf = (cell) => Math.min((positions[2 * cell + 1] * BINS) >> 16, BINS - 1) * BINS + ((positions[2 * cell] * BINS) >> 16);
const binStart = new Uint32Array(BINS * BINS + 1);
let binned = null;

function fillBins() {
  binned = new Uint32Array(count);
  for (let cell = 0; cell < count; cell++) binStart[binOf(cell) + 1]++;
  for (let bin = 0; bin < BINS * BINS; bin++) binStart[bin + 1] += binStart[bin];
  const next = binStart.slice();
  for (let cell = 0; cell < count; cell++) binned[next[binOf(cell)]++] = cell;
}

// The cell that is not hidden and nearest to a place on the screen, within `reach` CSS pixels; -1 for none.
function cellNear(x, y, reach) {
  const clamp = (value) => Math.min(Math.max(Math.floor((value * SIDE * BINS) / 65536), 0), BINS - 1);
  let best = -1, bestDistance = reach * reach;
  for (let row = clamp(mapY(y - reach)); row <= clamp(mapY(y + reach)); row++) {
    for (let column = clamp(mapX(x - reach)); column <= clamp(mapX(x + reach)); column++) {
      for (let i = binStart[row * BINS + column]; i < binStart[row * BINS + column + 1]; i++) {
        const cell = binned[i];
        if (levels[cell] === OFF) continue;
        const distance = (screenX(cell) - x) ** 2 + (screenY(cell) - y) ** 2;
        if (distance < bestDistance) [best, bestDistance] = [cell, distance];
      }
    }
  }
  return best;
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

// The cells inside a polygon on the map, or on the slide that is shown; hidden ones are left out.
function cellsWithin(polygon) {
  return shownCells((cell) => isWithin(polygon, positions[2 * cell] / SIDE, positions[2 * cell + 1] / SIDE));
}

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
