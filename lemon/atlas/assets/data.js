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

const fields = facts.fields;
for (const field of fields) {
  const bytes = bytesOf(`array-${field.key}`);
  if (field.kind === "category") {
    field.codes = new Uint16Array(bytes.buffer);
    field.hidden = new Set();
    field.counts = new Map();
    for (const code of field.codes) field.counts.set(code, (field.counts.get(code) || 0) + 1);
  } else {
    field.values = new Float32Array(bytes.buffer);
  }
}
const indexOfId = new Map(ids.map((id, index) => [id, index]));

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
