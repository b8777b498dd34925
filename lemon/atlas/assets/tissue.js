// The slide beside the map: OpenSeadragon shows its picture, a canvas above it the cells at their places.

const tissue = element("tissue");
let slide = -1; // number of the slide that is shown
let picture = null; // where it lies, as Python wrote it
let viewer = null; // of OpenSeadragon
let isPictureOpen = false;
let opening = -1; // number of the slide whose picture the viewer was given last
let tissuePath = null; // [x, y] in level-0 px while a lasso is drawn
let centred = -1; // the cell to go to once the picture is there

function openViewer() {
  const still = { clickToZoom: false, dblClickToZoom: false };
  viewer = OpenSeadragon({
    element: element("slide"),
    drawer: "canvas", // WebGL would take the graphics card for one picture
    showNavigationControl: false,
    showNavigator: false,
    tabIndex: -1,
    animationTime: 0.3,
    maxZoomPixelRatio: 8,
    gestureSettingsMouse: still,
    gestureSettingsTouch: still,
    gestureSettingsPen: still,
  });
  viewer.innerTracker.keyDownHandler = viewer.innerTracker.keyHandler = null; // the page has keys of its own
  viewer.addHandler("update-viewport", drawTissue);
  viewer.addHandler("open", () => {
    isPictureOpen = opening === slide;
    if (isPictureOpen && centred >= 0) goTo(centred);
  });
  viewer.addHandler("canvas-press", ({ position, originalEvent }) => {
    if (isLassoOn() || originalEvent.shiftKey) tissuePath = [levelZero(position)];
  });
  viewer.addHandler("canvas-drag", (event) => {
    if (!tissuePath) return;
    event.preventDefaultAction = true;
    tissuePath.push(levelZero(event.position));
    drawTissue();
  });
  viewer.addHandler("canvas-drag-end", (event) => (event.preventDefaultAction ||= tissuePath !== null));
  viewer.addHandler("canvas-release", ({ originalEvent }) => {
    const path = tissuePath;
    tissuePath = null;
    if (path?.length > 2) endLasso(cellsWithinTissue(path), originalEvent);
    drawTissue();
  });
  viewer.addHandler("canvas-click", ({ quick, position, originalEvent }) => {
    if (quick) click(cellOnTissue(position), originalEvent);
  });
  new OpenSeadragon.MouseTracker({
    element: element("slide"),
    moveHandler: ({ position }) => hover(cellOnTissue(position), position.x, position.y, tissue),
    leaveHandler: () => hover(-1),
  });
}

// Show a slide by its number; called again only when it is another.
async function showSlide(number) {
  if (number === slide || !viewer) return;
  slide = number;
  isPictureOpen = false;
  const described = await jsonOf(`slide-${number}`);
  if (slide !== number) return; // another was asked for meanwhile
  picture = described;
  opening = number;
  element("slide-name").value = String(number);
  element("slide-note").textContent = picture.fault ? `Tissue not shown: ${picture.fault}` : "";
  if (!picture.jpeg) {
    const getTileUrl = (level, column, row) => `tissue/${number}/${level}/${column}/${row}`;
    const { width, height } = picture;
    const tileSize = facts.tilePx, minLevel = Math.min(Math.log2(tileSize), Math.ceil(Math.log2(Math.max(width, height))));
    return viewer.open({ width, height, tileSize, minLevel, getTileUrl });
  }
  const bytes = Uint8Array.from(atob(picture.jpeg), (letter) => letter.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
  viewer.addOnceHandler("open", () => URL.revokeObjectURL(url));
  viewer.open({ type: "image", url });
}

// CSS pixels a level-0 px, and where level-0 px 0, 0 lies.
function tissueFrame() {
  const zero = viewer.viewport.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
  const far = viewer.viewport.imageToViewerElementCoordinates(new OpenSeadragon.Point(picture.width, 0));
  const scale = ((far.x - zero.x) / picture.width) * picture.scale;
  return { scale, left: zero.x - picture.x * scale, top: zero.y - picture.y * scale };
}

function levelZero(position) {
  const { scale, left, top } = tissueFrame();
  return [(position.x - left) / scale, (position.y - top) / scale];
}

// Where a cell of the slide that is shown lies, in CSS pixels of the tissue.
function tissuePlace(cell) {
  const { scale, left, top } = tissueFrame();
  return [places[2 * cell] * scale + left, places[2 * cell + 1] * scale + top];
}

function cellOnTissue(position) {
  if (!isTissueThere() || !element("cells-on-slide").checked) return -1;
  const [x, y] = levelZero(position);
  const reach = 10 / tissueFrame().scale;
  let best = -1, bestDistance = Math.max(reach, 8 / picture.mpp) ** 2; // 8 um: of a large nucleus
  for (const cell of cellsOfSlide[slide]) {
    if (levels[cell] === OFF) continue;
    const distance = (places[2 * cell] - x) ** 2 + (places[2 * cell + 1] - y) ** 2;
    if (distance < bestDistance) [best, bestDistance] = [cell, distance];
  }
  return best;
}

const isTissueThere = () => isPictureOpen;

// Bring a cell into view; nearer when it would be a speck.
function goTo(cell) {
  showSlide(slideOf[cell]);
  centred = isTissueThere() ? -1 : cell;
  if (centred >= 0) return;
  const at = new OpenSeadragon.Point((places[2 * cell] - picture.x) * picture.scale, (places[2 * cell + 1] - picture.y) * picture.scale);
  const factor = 20 / ((8 / picture.mpp) * tissueFrame().scale); // 8 um on 20 CSS pixels
  if (factor > 1) viewer.viewport.zoomBy(factor);
  viewer.viewport.panTo(viewer.viewport.imageToViewportCoordinates(at));
  viewer.viewport.applyConstraints();
}

function drawTissue() {
  if (!isTissueThere() || !tissue.clientWidth) return;
  const canvas = element("slide-cells");
  if (canvas.clientWidth !== tissue.clientWidth || canvas.clientHeight !== tissue.clientHeight) {
    fitCanvas(canvas, tissue.clientWidth, tissue.clientHeight);
  }
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  const frame = tissueFrame();
  if (element("cells-on-slide").checked) drawCellsOn(context, frame);
  if (pinned >= 0 && slideOf[pinned] === slide) ringAt(context, ...tissuePlace(pinned), 14, "#000", 3);
  if (hovered >= 0 && slideOf[hovered] === slide) ringAt(context, ...tissuePlace(hovered), 14, "#1a56c4", 2);
  if (tissuePath) drawPath(context, tissuePath.map(([x, y]) => [x * frame.scale + frame.left, y * frame.scale + frame.top]));
  drawScaleBar(context, canvas.clientHeight, frame.scale / picture.mpp);
}

// Outlines where a nucleus is some pixels wide, else squares; what is not selected is drawn faint and first.
function drawCellsOn(context, { scale, left, top }) {
  const [width, height] = [tissue.clientWidth, tissue.clientHeight];
  const nucleus = (8 / picture.mpp) * scale; // CSS pixels
  const side = Math.min(Math.max(nucleus / 2, 2.5), 8);
  const step = (facts.outlineUm / picture.mpp) * scale;
  for (const level of [FADED, FULL]) {
    context.globalAlpha = level === FADED ? 0.35 : 1;
    let color = -1; // a canvas takes long to read a colour
    for (const cell of cellsOfSlide[slide]) {
      if (levels[cell] !== level) continue;
      const x = places[2 * cell] * scale + left, y = places[2 * cell + 1] * scale + top;
      if (x < -40 || y < -40 || x > width + 40 || y > height + 40) continue;
      if (pixels[cell] !== color) {
        color = pixels[cell];
        context.fillStyle = context.strokeStyle = hexOf(color);
      }
      if (nucleus < 9 || !corners[cell]) {
        context.fillRect(x - side / 2, y - side / 2, side, side);
        continue;
      }
      context.beginPath();
      for (let i = 0, at = outlineStart[cell]; i < corners[cell]; i++, at += 2) {
        context.lineTo(x + outlines[at] * step, y + outlines[at + 1] * step);
      }
      context.closePath();
      strokeOnTissue(context, level === FADED ? 1 : selection ? 3 : 2);
    }
  }
  context.globalAlpha = 1;
}

// With a white rim, as colours of clusters are those of tissue too.
function strokeOnTissue(context, width) {
  const color = context.strokeStyle;
  context.strokeStyle = "rgba(255, 255, 255, 0.8)";
  context.lineWidth = width + 1.5;
  context.stroke();
  context.strokeStyle = color;
  context.lineWidth = width;
  context.stroke();
}

// A round length of about 100 CSS pixels.
function drawScaleBar(context, height, pxPerUm) {
  const wanted = 100 / pxPerUm, power = 10 ** Math.floor(Math.log10(wanted));
  const length = power * [5, 2, 1].find((digit) => digit * power <= wanted);
  const text = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  context.fillStyle = "rgba(255, 255, 255, 0.85)";
  context.fillRect(8, height - 34, length * pxPerUm + 12, 28);
  context.fillStyle = "#000";
  context.fillRect(14, height - 13, length * pxPerUm, 3);
  context.font = "12px sans-serif";
  context.fillText(text, 14, height - 18);
}
