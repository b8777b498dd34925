// Cell images. A sheet is decoded when one of its cells is looked at; what was looked at is copied to a shelf, so that
// a view over more sheets than memory should hold still fills up.

const SHEETS_KEPT = 8; // 2.4 MB each once decoded
const SHEETS_AT_ONCE = 4; // that are being decoded
const SHELF_SIDE = 64; // 4096 cells, 38 MB

const px = facts.thumbnailPx;
const perSheet = facts.sheetSide * facts.sheetSide;
const sheets = new Map(); // number -> ImageBitmap; the last used is the last
const wanted = new Map(); // number of a sheet -> cells to be taken from it; the last asked for is served first
let busy = 0;
const shelf = document.createElement("canvas");
shelf.width = shelf.height = SHELF_SIDE * px;
const shelved = new Map(); // cell -> its place on the shelf; the last used is the last
let onSheet = () => {};

// Draw a cell's image as a square of `size`; false when it is not there yet (onSheet tells when it is).
function drawCell(context, cell, x, y, size) {
  const place = shelved.get(cell);
  if (place === undefined) {
    want(cell);
    return false;
  }
  shelved.delete(cell);
  shelved.set(cell, place);
  const [left, top] = cornerOf(place, SHELF_SIDE);
  context.imageSmoothingQuality = "high";
  // Half a pixel inwards, so that smoothing takes nothing from the neighbour.
  context.drawImage(shelf, left + 0.5, top + 0.5, px - 1, px - 1, x, y, size, size);
  return true;
}

const cornerOf = (place, side) => [(place % side) * px, Math.floor(place / side) * px];

function want(cell) {
  if (!isRead) return;
  const number = Math.floor(slots[cell] / perSheet);
  const cells = wanted.get(number) ?? new Set();
  wanted.delete(number);
  wanted.set(number, cells.add(cell));
  serve();
}

function serve() {
  while (busy < SHEETS_AT_ONCE && wanted.size) {
    const [number, cells] = [...wanted].at(-1);
    wanted.delete(number);
    busy++;
    openSheet(number)
      .then((sheet) => {
        for (const cell of cells) putOnShelf(cell, sheet);
        onSheet();
      })
      .finally(() => {
        busy--;
        serve();
      });
  }
}

async function openSheet(number) {
  const sheet = sheets.get(number) ?? (await createImageBitmap(new Blob([await bufferOf(`sheet-${number}`)])));
  sheets.delete(number);
  sheets.set(number, sheet);
  if (sheets.size > SHEETS_KEPT) sheets.delete(sheets.keys().next().value);
  return sheet;
}

// The place of the cell that was not looked at for longest is taken when the shelf is full.
function putOnShelf(cell, sheet) {
  let place = shelved.get(cell) ?? shelved.size;
  if (place === SHELF_SIDE * SHELF_SIDE) {
    const oldest = shelved.keys().next().value;
    place = shelved.get(oldest);
    shelved.delete(oldest);
  }
  shelved.set(cell, place);
  const from = cornerOf(slots[cell] % perSheet, facts.sheetSide);
  const to = cornerOf(place, SHELF_SIDE);
  shelf.getContext("2d").drawImage(sheet, ...from, px, px, ...to, px, px);
}

// A canvas full of cell images; a click picks one, `mark` draws upon each.
class Gallery {
  constructor(canvas, { columns, size, most, onPick, mark }) {
    Object.assign(this, { canvas, columns, size, most, mark, cells: [] });
    canvas.addEventListener("click", (event) => {
      const column = Math.floor(event.offsetX / size);
      const cell = this.cells[Math.floor(event.offsetY / size) * this.columns + column];
      if (column < this.columns && cell !== undefined) onPick(cell, event);
    });
  }

  show(cells) {
    this.cells = cells.slice(0, this.most);
    fitCanvas(this.canvas, this.columns * this.size, Math.ceil(this.cells.length / this.columns) * this.size);
    this.draw();
  }

  draw() {
    const context = this.canvas.getContext("2d");
    this.cells.forEach((cell, i) => {
      const [x, y] = [(i % this.columns) * this.size, Math.floor(i / this.columns) * this.size];
      if (drawCell(context, cell, x, y, this.size - 2)) this.mark?.(context, cell, x, y, this.size - 2);
    });
  }
}

// Give a canvas a size in CSS pixels, sharp on any screen.
function fitCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.getContext("2d").scale(ratio, ratio);
}
