// What Python wrote: facts as JSON, numbers as base64 of little-endian arrays, a value a cell in the order of rank.

const MISSING = 65535;
const element = (id) => document.getElementById(id);
const facts = JSON.parse(element("facts").textContent);
const ids = facts.ids;
const count = ids.length;
const positions = new Uint16Array(bytesOf("array-positions").buffer); // x, y of each cell; 65535 is the map's side
const slots = new Uint32Array(bytesOf("array-slots").buffer); // place of each cell's thumbnail in the sheets
const places = new Float32Array(bytesOf("array-places").buffer); // x, y in the slide, level-0 px
const SIDE = 65535;
const slideOf = new Uint32Array(bytesOf("array-slide").buffer); // number of each cell's slide
let vectors = null; // principal components of each cell's embedding; read when first asked for, as they are most of the numbers
const weights = new Float32Array(bytesOf("array-weights").buffer); // of squared differences of each component
const corners = bytesOf("array-corners"); // points of each cell's outline
const outlines = new Int8Array(bytesOf("array-outlines").buffer); // their distances from the cell's place
const outlineStart = new Uint32Array(count);
for (let cell = 1; cell < count; cell++) outlineStart[cell] = outlineStart[cell - 1] + 2 * corners[cell - 1];

const fields = facts.fields;
for (const field of fields) {
  const bytes = bytesOf(`array-${field.key}`);
  if (field.kind === "category") {
    field.codes = new Uint16Array(bytes.buffer);
    field.hidden = new Set();
  } else {
    field.values = new Float32Array(bytes.buffer);
    field.range = null; // [low, high] of the cells that are shown
  }
}
// Classes can be given in the page, whether it came with some or not.
let classes = fields.find((field) => field.key === "label");
if (!classes) {
  classes = { kind: "category", key: "label", title: "Class", names: [], colors: [], hidden: new Set() };
  classes.codes = new Uint16Array(count).fill(MISSING);
  fields.push(classes);
}
const foreignIds = facts.foreignIds; // in another program, of each cell; empty where none has one
const indexOfId = new Map([...foreignIds.map((id, index) => [id, index]), ...ids.map((id, index) => [id, index])]);

function bytesOf(id) {
  const text = atob(element(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// A field's value of a cell, as it is told; null where there is none.
function told(field, cell) {
  if (field.kind === "category") {
    const code = field.codes[cell];
    return code === MISSING ? null : field.names[code];
  }
  return `${round(field.values[cell])} ${field.unit}`.trim();
}

function round(value) {
  return Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2);
}

// "#rrggbb" as a pixel of ImageData seen as Uint32: alpha, blue, green, red (every browser's machine is little-endian).
function pixelOf(hex) {
  const value = parseInt(hex.slice(1), 16);
  return (0xff000000 | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
}

function hexOf(pixel) {
  const value = ((pixel & 255) << 16) | (pixel & 0xff00) | ((pixel >> 16) & 255);
  return `#${value.toString(16).padStart(6, "0")}`;
}
