// What Python wrote. A page that is one file has it in script elements, numbers as base64; a page that `lemon atlas
// serve=true` sends asks its server for the same. Arrays are little-endian, a value a cell in the order of rank.
//
// The map needs little of it and is drawn as soon as that is there; `isRead` tells that all else is too.

const MISSING = 65535;
const SIDE = 65535;
const element = (id) => document.getElementById(id);
const facts = JSON.parse(element("facts").textContent);
const count = facts.count;
const fields = facts.fields;
const weights = Float32Array.from(facts.weights); // of squared differences of each component of a vector
let slots = null; // place of each cell's thumbnail in the sheets
let places = null; // x, y in the slide, level-0 px
let slideOf = null; // number of each cell's slide
let corners = null; // points of each cell's outline
let outlines = null; // their distances from the cell's place
let outlineStart = null;
let cellsOfSlide = null; // for each slide its cells, ascending
let vectors = null; // principal components of each cell's embedding; read when first asked for
let ids = [];
let foreignIds = []; // in another program, of each cell; empty where none has one
let isRead = false;

// Classes can be given in the page, whether it came with some or not.
let classes = fields.find((field) => field.key === "label");
if (!classes) {
  classes = { kind: "category", key: "label", title: "Class", names: [], colors: [] };
  classes.codes = new Uint16Array(count).fill(MISSING);
  fields.push(classes);
}
for (const field of fields) {
  if (field.kind === "category") field.hidden = new Set();
  else field.range = null; // [low, high] of the cells that are shown
}

async function readFirst() {
  map.positions = new Uint16Array(await bufferOf("positions")); // x, y of each cell; 65535 is the map's side
  await readField(fields[0]);
}

async function readRest() {
  if (document.readyState === "loading") await new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve));
  const names = ["slots", "places", "slide", "corners", "outlines"];
  const [ofSlots, ofPlaces, ofSlide, ofCorners, ofOutlines] = await Promise.all(names.map(bufferOf));
  slots = new Uint32Array(ofSlots);
  places = new Float32Array(ofPlaces);
  slideOf = new Uint32Array(ofSlide);
  corners = new Uint8Array(ofCorners);
  outlines = new Int8Array(ofOutlines);
  outlineStart = new Uint32Array(count);
  for (let cell = 1; cell < count; cell++) outlineStart[cell] = outlineStart[cell - 1] + 2 * corners[cell - 1];
  const sizes = new Uint32Array(facts.slides.length);
  for (const number of slideOf) sizes[number]++;
  cellsOfSlide = Array.from(sizes, (size) => new Uint32Array(size));
  sizes.fill(0);
  for (let cell = 0; cell < count; cell++) cellsOfSlide[slideOf[cell]][sizes[slideOf[cell]]++] = cell;
  if (other) other.positions = new Uint16Array(await bufferOf("positions-against"));
  await Promise.all(fields.map(readField));
  ids = await jsonOf("ids");
  foreignIds = await jsonOf("foreign-ids");
  isRead = true;
}

async function readField(field) {
  if (field.codes || field.values) return;
  const buffer = await bufferOf(field.key);
  if (field.kind === "category") field.codes = new Uint16Array(buffer);
  else field.values = new Float32Array(buffer);
}

async function bufferOf(name) {
  if (facts.served) return (await answerOf(`data/${name}`)).arrayBuffer();
  const text = element(`data-${name}`).textContent;
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer; // browsers of 2025 and later
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes.buffer;
}

async function jsonOf(name) {
  return facts.served ? (await answerOf(`data/${name}`)).json() : JSON.parse(element(`data-${name}`).textContent);
}

// What the server answers; where it does not, the page says so.
async function answerOf(address) {
  const answer = await fetch(address).catch(() => null);
  element("server-note").hidden = Boolean(answer?.ok);
  if (!answer?.ok) throw new Error(`${address}: ${answer ? answer.status : "no answer"}`);
  return answer;
}

// A field's value of a cell, as it is told; null where there is none.
function told(field, cell) {
  if (field.kind === "category") {
    const code = field.codes[cell];
    return code === MISSING ? null : field.names[code];
  }
  const value = field.values[cell];
  return Number.isNaN(value) ? null : `${round(value)} ${field.unit}`.trim();
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
