"use strict";
// What all pages share: making elements, numbers in words, and a map in metres that is drawn on a canvas.

const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "line", "path", "text", "circle"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}
// Ties go to the even digit, as in the console's tables: 21.25 is 21.2. What so few bits do not hold is none: 0.05.
function number(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  const scaled = value * 10 ** digits, few = Number.isInteger(value * 2 ** (digits + 1));
  const tie = few && !Number.isInteger(scaled) && Number.isInteger(2 * scaled);
  return (tie ? (2 * Math.round(scaled / 2)) / 10 ** digits : value).toFixed(digits);
}
const count = (value, noun = "") => value.toLocaleString("en-US") + (noun && ` ${noun}${value === 1 ? "" : "s"}`);
const metres = (value) =>
  value === null ? "unknown" : value >= 10000 ? `${(value / 1000).toFixed(1)} km` : `${value.toFixed(value < 10 ? 1 : 0)} m`;
const groupColour = (group, alpha) => `hsl(${(215 + group * 137.5) % 360} 55% 55% / ${alpha})`;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Metres around a table of cells { M, east, north, group }, whose columns and rows count from the map's corner.
function boundsOf(cells) {
  let [west, south, east, north] = [Infinity, Infinity, -Infinity, -Infinity];
  for (let k = 0; k < cells.east.length; k++) {
    west = Math.min(west, cells.east[k]); east = Math.max(east, cells.east[k] + 1);
    south = Math.min(south, cells.north[k]); north = Math.max(north, cells.north[k] + 1);
  }
  return [west, south, east, north].map((v) => v * cells.M);
}

// A table of cells as a picture of a pixel each, made once: of a large city, drawing each cell anew takes half a second.
// Null where that would be too large a picture.
function pictureOf(cells) {
  if (cells.picture !== undefined) return cells.picture;
  const [west, south, east, north] = boundsOf(cells).map((v) => v / cells.M), canvas = document.createElement("canvas");
  canvas.width = Math.round(east - west); canvas.height = Math.round(north - south);
  if (Math.max(canvas.width, canvas.height) > 8192 || canvas.width * canvas.height > 2 ** 24) return (cells.picture = null);
  const c = canvas.getContext("2d");
  let group = null;
  for (let k = 0; k < cells.east.length; k++) {
    if (cells.group[k] !== group) c.fillStyle = groupColour((group = cells.group[k]), 1);
    c.fillRect(Math.round(cells.east[k] - west), Math.round(north - cells.north[k] - 1), 1, 1);
  }
  return (cells.picture = { canvas, west, north });
}

// A map that pans and zooms by pointer, wheel, two fingers and keys; north is up. `paint(c, width, height)` draws it,
// `find(x, y)` names the thing at a point of the canvas or null, `onHover` and `onKeep` are told of that thing. What
// `paintOver` draws on top may follow the pointer: it alone is drawn anew when the hovered thing changes.
class CityMap {
  constructor(canvas, { paint, paintOver, find, onHover, onKeep }) {
    Object.assign(this, { canvas, paint, paintOver, find, onHover, onKeep, scale: 1, x: 0, y: 0, hovered: null, fingers: new Map(), moved: false });
    this.below = document.createElement("canvas");
    this.measure();
    this.listen();
  }

  // The canvas's size is kept: asking the page for it at every point costs more than drawing the point.
  measure() {
    this.width = this.canvas.clientWidth; this.height = this.canvas.clientHeight;
  }

  // Show `bounds` [west, south, east, north], at most `closest` pixels a metre.
  fit([west, south, east, north], closest = 60) {
    this.measure();
    this.scale = Math.min(0.94 * Math.min(this.width / (east - west), this.height / (north - south)), closest);
    this.x = (west + east) / 2; this.y = (south + north) / 2;
    this.draw();
  }

  toScreen(east, north) {
    return [this.width / 2 + (east - this.x) * this.scale, this.height / 2 - (north - this.y) * this.scale];
  }

  zoom(factor, px = this.width / 2, py = this.height / 2) {
    const dx = px - this.width / 2, dy = this.height / 2 - py;
    const next = Math.min(Math.max(this.scale * factor, 1e-4), 60);
    this.x += dx / this.scale - dx / next; this.y += dy / this.scale - dy / next;
    this.scale = next;
    this.draw();
  }

  pan(dx, dy) {
    this.x -= dx / this.scale; this.y += dy / this.scale;
    this.later();
  }

  later() {
    this.stale = true;
    this.soon();
  }

  soon() {
    this.frame ??= requestAnimationFrame(() => (this.stale ? this.draw() : this.drawOver()));
  }

  draw() {
    this.measure();
    this.stale = false;
    const { canvas, below, width, height } = this, ratio = window.devicePixelRatio || 1;
    for (const some of [canvas, below]) { some.width = Math.round(width * ratio); some.height = Math.round(height * ratio); }
    const c = below.getContext("2d");
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.paint(c, width, height);
    this.drawOver();
  }

  drawOver() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    const { canvas, below } = this, c = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    if (below.width && below.height) c.drawImage(below, 0, 0);
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.paintOver?.(c);
  }

  drawCells(c, cells, alpha = 0.22) {
    const { width, height } = this, side = cells.M * this.scale, gap = side > 8 ? 1 : 0, size = Math.max(side - gap, 1);
    const [left, bottom] = this.toScreen(0, 0), small = side < 2 ? pictureOf(cells) : null;
    if (small) {
      c.globalAlpha = Math.min(alpha * Math.max(side ** -2, 1), 1); c.imageSmoothingQuality = "high";
      c.drawImage(small.canvas, left + small.west * side, bottom - small.north * side, small.canvas.width * side, small.canvas.height * side);
      c.globalAlpha = 1;
      return;
    }
    let group = null;
    for (let k = 0; k < cells.east.length; k++) {
      const x = left + cells.east[k] * side, y = bottom - (cells.north[k] + 1) * side;
      if (x + side < 0 || y + side < 0 || x > width || y > height) continue;
      if (cells.group[k] !== group) c.fillStyle = groupColour((group = cells.group[k]), alpha);
      c.fillRect(x, y, size, size);
    }
  }

  // The outline of an answered cell around its centre in metres, with its rank (0: the best).
  drawRank(c, east, north, M, rank) {
    const [x, y] = this.toScreen(east, north), side = Math.max(M * this.scale, 8);
    c.strokeStyle = rank ? colour("soft") : colour("ink"); c.lineWidth = rank ? 1 : 2.2;
    c.strokeRect(x - side / 2, y - side / 2, side, side);
    c.font = "600 12px system-ui, sans-serif"; c.textAlign = "center"; c.textBaseline = "middle";
    c.lineWidth = 3; c.strokeStyle = colour("paper"); c.strokeText(rank + 1, x, y); c.fillStyle = colour("ink"); c.fillText(rank + 1, x, y);
  }

  drawDot(c, east, north, fill) {
    c.fillStyle = fill; c.strokeStyle = colour("paper"); c.lineWidth = 2;
    c.beginPath(); c.arc(...this.toScreen(east, north), 7, 0, 7); c.fill(); c.stroke();
  }

  drawScale(c) {
    let length = 10 ** Math.floor(Math.log10(130 / this.scale));
    if (length * 5 * this.scale <= 150) length *= 5; else if (length * 2 * this.scale <= 150) length *= 2;
    const w = length * this.scale, { height } = this;
    c.globalAlpha = 0.85; c.fillStyle = colour("paper"); c.fillRect(10, height - 38, w + 20, 28); c.globalAlpha = 1;
    c.strokeStyle = colour("ink"); c.lineWidth = 2;
    c.beginPath(); c.moveTo(20, height - 21); c.lineTo(20, height - 16); c.lineTo(20 + w, height - 16); c.lineTo(20 + w, height - 21); c.stroke();
    c.fillStyle = colour("ink"); c.font = "12px system-ui, sans-serif"; c.textAlign = "center"; c.textBaseline = "alphabetic";
    c.fillText(length >= 1000 ? `${length / 1000} km` : `${length} m`, 20 + w / 2, height - 24);
  }

  // Put `card` beside a point in metres, inside the map.
  placeCard(card, east, north) {
    const [x, y] = this.toScreen(east, north), wide = card.offsetWidth + 14;
    card.style.left = `${Math.max(4, x + wide + 6 < this.width ? x + 14 : x - wide)}px`;
    card.style.top = `${Math.max(4, Math.min(y + 14, this.height - card.offsetHeight - 6))}px`;
  }

  hover(found) {
    if (found === this.hovered) return;
    this.hovered = found;
    this.onHover?.(found);
    if (this.paintOver) this.soon(); else this.later();
  }

  listen() {
    const { canvas, fingers } = this;
    const position = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    canvas.onpointerdown = (event) => {
      if (!fingers.size) this.moved = false;
      fingers.set(event.pointerId, position(event));
      canvas.setPointerCapture(event.pointerId);
    };
    canvas.onpointermove = (event) => {
      const at = position(event), before = fingers.get(event.pointerId);
      if (!before) return this.hover(this.find(...at));
      const dx = at[0] - before[0], dy = at[1] - before[1];
      if (!this.moved && Math.hypot(dx, dy) < 4) return;
      this.moved = true;
      fingers.set(event.pointerId, at);
      const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
      if (!other) return this.pan(dx, dy);
      const apart = (point) => Math.max(Math.hypot(point[0] - other[0], point[1] - other[1]), 1);
      this.zoom(apart(at) / apart(before), (at[0] + other[0]) / 2, (at[1] + other[1]) / 2);
    };
    canvas.onpointerup = (event) => {
      if (fingers.delete(event.pointerId) && !this.moved) { this.onKeep?.(this.find(...position(event))); this.later(); }
    };
    canvas.onpointercancel = (event) => fingers.delete(event.pointerId);
    canvas.onpointerleave = () => { if (!fingers.size) this.hover(null); };
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); this.zoom(Math.exp(-event.deltaY * 0.0016), ...position(event)); }, { passive: false });
    canvas.onkeydown = (event) => {
      const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
      if (event.key === "+" || event.key === "=") this.zoom(1.4);
      else if (event.key === "-") this.zoom(1 / 1.4);
      else if (moves[event.key]) this.pan(...moves[event.key]);
      else return;
      event.preventDefault();
    };
    $("zoom-in").onclick = () => this.zoom(1.6); $("zoom-out").onclick = () => this.zoom(1 / 1.6);
    new ResizeObserver(() => this.later()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.later());
  }
}
