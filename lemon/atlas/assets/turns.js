// Classes given one by one: the selection lies open as a sheet below the map and the tissue, a class goes to the pinned
// cell, which has a frame there, and the next is pinned. What is needed for it moves into the sheet meanwhile.

let isInTurn = false;

function beginTurns() {
  isInTurn = true;
  document.body.classList.add("turns");
  element("turn").hidden = false;
  element("turn").append(element("pinned-card"), element("class-tools"));
  showSheet(0);
  takeTurn(selection.find((cell) => classes.codes[cell] === MISSING) ?? selection[0]);
  element("sheet").focus({ preventScroll: true });
}

function endTurns() {
  if (!isInTurn) return;
  isInTurn = false;
  document.body.classList.remove("turns");
  element("turn").hidden = true;
  element("pinned-title").after(element("pinned-card"));
  element("classes-title").after(element("class-tools"));
}

// Pin a cell and bring it into view.
function takeTurn(cell) {
  pin(cell);
  const at = selection?.indexOf(cell) ?? -1;
  if (at < 0) return;
  if (at < sheetStart || at >= sheetStart + A_PAGE) showSheet(Math.floor(at / A_PAGE) * A_PAGE);
  const { columns, size, canvas } = galleries.sheet;
  const pane = canvas.parentElement;
  const top = Math.floor((at - sheetStart) / columns) * size;
  if (top < pane.scrollTop || top + size > pane.scrollTop + pane.clientHeight) pane.scrollTop = top - size;
  tellTurns();
}

// The next cell of the selection, or the one before; at its ends, and from a cell that is none of it, nothing moves.
function moveTurn(step) {
  const at = selection?.indexOf(pinned) ?? -1;
  if (at >= 0 && selection[at + step] !== undefined) takeTurn(selection[at + step]);
}

function tellTurns() {
  if (!isInTurn || !selection) return;
  const given = selection.filter((cell) => classes.codes[cell] !== MISSING).length;
  element("turn-told").textContent = `${given} of ${selection.length.toLocaleString("en")} have a class`;
}

// A cell of the sheet: its class on a white strip, and a frame around the one whose turn it is.
function markOnSheet(context, cell, x, y, size) {
  const code = classes.codes[cell];
  if (code !== MISSING) {
    context.fillStyle = "#fff";
    context.fillRect(x, y + size - 15, size, 15);
    context.fillStyle = classes.colors[code];
    context.fillRect(x, y + size - 15, 8, 15);
    context.fillStyle = "#1c1c1c";
    context.font = "11px sans-serif";
    const name = classes.names[code];
    let shown = name;
    while (shown && context.measureText(shown).width > size - 14) shown = shown.slice(0, -1);
    context.fillText(shown, x + 11, y + size - 4);
  }
  if (cell !== pinned) return;
  for (const [color, width] of [["#fff", 5], ["#000", 3]]) {
    context.strokeStyle = color;
    context.lineWidth = width;
    context.strokeRect(x + 2, y + 2, size - 4, size - 4);
  }
}

// What `show=` names: those cells are selected, in the order of the list.
function openList({ ids: listed, classes: offered }) {
  const order = new Map(listed.map((id, at) => [id, at]));
  const cells = new Array(listed.length);
  ids.forEach((id, cell) => order.has(id) && (cells[order.get(id)] = cell));
  for (const name of offered) if (!classes.names.includes(name)) appendClass(name);
  setSelection(cells);
  refresh();
  beginTurns();
}
