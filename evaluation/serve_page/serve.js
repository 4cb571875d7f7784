
// One photo at a time: `answer` is what /locate said of it, `selected` the place that is shown, `near` the known photos there.
let about = null, answer = null, selected = 0, near = [], request = null;

const local = (place) => [place.east - about.corner[0], place.north - about.corner[1]];
const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${number(100 * share)} %`);
const degrees = (value, positive, negative) => `${Math.abs(value).toFixed(5)}° ${value < 0 ? negative : positive}`;
const position = (place) => place.latitude === null ? `${number(place.east, 0)} E, ${number(place.north, 0)} N`
  : `${degrees(place.latitude, "N", "S")}, ${degrees(place.longitude, "E", "W")}`;

function state(name, words = "") {
  document.body.dataset.state = name;
  $("status").textContent = words;
  $("drop").setAttribute("aria-busy", name === "waiting");
}

// Asking

async function ask(file) {
  request?.abort();
  const mine = (request = new AbortController());
  clear();
  if (file.size > about.max_bytes) return state("error", `The file is larger than the ${about.max_bytes / 1e6} MB that are accepted.`);
  state("waiting", "Looking for the place…");
  try {
    const reply = await send(`locate?name=${encodeURIComponent(file.name ?? "")}`, { method: "POST", body: file, signal: mine.signal });
    if (mine === request) show(reply, file);
  } catch (error) {
    if (mine === request) state("error", error.message);
  }
}

// The server's JSON; an Error with its words where it refuses.
async function send(address, options = {}) {
  let reply;
  try {
    reply = await fetch(address, options);
  } catch (error) {
    throw options.signal?.aborted ? error : new Error("The server cannot be reached.");
  }
  const said = await reply.json().catch(() => ({ error: `The server answered ${reply.status}.` }));
  if (!reply.ok) throw new Error(said.error);
  return said;
}

function clear() {
  answer = null; near = [];
  for (const id of ["photo", "answer", "known", "fit-answer", "card"]) $(id).hidden = true;
  map.hovered = null;
  map.draw();
}

// Showing

function show(reply, file) {
  answer = { ...reply.photos[0], id: reply.answer, known: reply.known_east_north };
  URL.revokeObjectURL($("photo").src);
  $("photo").src = URL.createObjectURL(file);
  for (const id of ["photo", "answer", "fit-answer"]) $(id).hidden = false;
  $("ask").textContent = "Choose another photo";
  $("places").replaceChildren(...answer.places.map(placeItem));
  const known = answer.known_position;
  $("answer-note").textContent = known ? `${known.source === "exif" ? "Its EXIF GPS" : "Its name"} says ${position(known)}, the green dot.` : "";
  state("answer");
  select(0);
  fitAnswer();
}

function placeItem(place, rank) {
  const bar = el("i"), button = el("button", { class: "place", type: "button" },
    el("span", { class: "rank" }, rank + 1), el("span", { class: "bar" }, bar), el("span", { class: "percent" }, percent(place.confidence)),
    el("span", { class: "facts" }, position(place), el("br"), `68 % within ${metres(place.uncertainty_m)}` +
      (place.distance_m === null ? "" : `, ${metres(place.distance_m)} from ${answer.known_position.source === "exif" ? "its GPS" : "its name"}`)));
  bar.style.width = `${100 * place.confidence}%`;
  button.onclick = () => { select(rank); closeUp(rank); };
  const item = el("li", {}, button);
  item.onpointerenter = () => map.hover(rank); item.onpointerleave = () => map.hover(null);
  if (place.latitude !== null) {
    const at = `${place.latitude.toFixed(6)}/${place.longitude.toFixed(6)}`, [latitude, longitude] = at.split("/");
    item.append(el("a", { href: `https://www.openstreetmap.org/?mlat=${latitude}&mlon=${longitude}#map=18/${at}`, target: "_blank",
      rel: "noopener noreferrer", "aria-label": `place ${rank + 1} on OpenStreetMap` }, "OSM"));
  }
  return item;
}

function select(rank) {
  selected = rank; near = [];
  [...$("places").children].forEach((item, i) => {
    const button = item.firstElementChild;
    if (i === rank) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
  });
  map.draw();
  if (answer.id) showKnown(answer, rank);
}

async function showKnown(asked, rank) {
  let found = [], words = "";
  try {
    found = (await send(`known/${asked.id}/${rank}`)).photos;
  } catch (error) {
    words = error.message;
  }
  if (asked !== answer || rank !== selected) return;
  near = found;
  $("known").hidden = false;
  $("known-title").textContent = words || (found.length ? `Known photos of place ${rank + 1}` : `No known photo of place ${rank + 1}`);
  $("known-photos").replaceChildren(...found.map((photo) => el("figure", {}, el("img", { src: photo.picture, alt: "known photo" }),
    [when(photo.timestamp), `${Math.round(100 * photo.likeness)} % alike`].filter(Boolean).join(", "))));
  map.draw();
}

const when = (timestamp) => (/^\d{6}/.test(timestamp) ? `${timestamp.slice(0, 4)}-${timestamp.slice(4, 6)}` : timestamp);

// The map

// Circles wider than this many metres say little and would push the places together.
const WIDE = 250;
// A known position farther off than this is not of this city.
const FAR = 50000;

function extent(places) {
  const parts = places.map((place) => [...local(place), Math.min(Math.max(place.uncertainty_m, 60), WIDE)]);
  const known = knownPoint();
  if (known) parts.push([...known, 60]);
  const [west, south] = [0, 1].map((k) => Math.min(...parts.map((p) => p[k] - p[2])));
  const [east, north] = [0, 1].map((k) => Math.max(...parts.map((p) => p[k] + p[2])));
  return [west, south, east, north];
}
const fitAnswer = () => map.fit(extent(answer.places), 4);
const closeUp = (rank) => map.fit(extent([answer.places[rank]]), 4);

// The known position in the map's metres; null where there is none within reach of the city.
function knownPoint() {
  return answer.known && answer.places[0].distance_m < FAR ? answer.known.map((v, k) => v - about.corner[k]) : null;
}

function paint(c) {
  if (!about) return;
  map.drawCells(c, about.cells, answer ? 0.16 : 0.3);
  if (answer) {
    const pointed = map.hovered ?? selected;
    answer.places.forEach((place, rank) => { if (rank !== pointed) drawCircle(c, place, false); });
    drawCircle(c, answer.places[pointed], true);
    for (const photo of near) drawSquare(c, photo);
    for (let rank = answer.places.length - 1; rank >= 0; rank--) map.drawRank(c, ...local(answer.places[rank]), about.cells.M, rank);
    const known = knownPoint();
    if (known) map.drawDot(c, ...known, colour("right"));
  }
  map.drawScale(c);
}

function drawCircle(c, place, chosen) {
  c.strokeStyle = c.fillStyle = colour("accent"); c.lineWidth = chosen ? 2 : 1;
  c.beginPath(); c.arc(...map.toScreen(...local(place)), place.uncertainty_m * map.scale, 0, 7);
  c.globalAlpha = chosen ? 0.12 : 0.02; c.fill();
  c.globalAlpha = chosen ? 0.9 : 0.15 + 0.5 * place.confidence; c.stroke(); c.globalAlpha = 1;
}

function drawSquare(c, photo) {
  const [x, y] = map.toScreen(...local(photo));
  c.fillStyle = colour("accent"); c.strokeStyle = colour("paper"); c.lineWidth = 1;
  c.fillRect(x - 3, y - 3, 6, 6); c.strokeRect(x - 3, y - 3, 6, 6);
}

function find(px, py) {
  let best = null, least = 18 ** 2;
  answer?.places.forEach((place, rank) => {
    const [x, y] = map.toScreen(...local(place)), d = (x - px) ** 2 + (y - py) ** 2;
    if (d < least) { least = d; best = rank; }
  });
  return best;
}

function onHover(rank) {
  [...$("places").children].forEach((item, i) => item.classList.toggle("pointed", i === rank));
  const card = $("card");
  card.hidden = rank === null;
  if (rank === null) return;
  const place = answer.places[rank];
  card.replaceChildren(el("strong", {}, `${rank + 1}. ${percent(place.confidence)}`), ` within ${metres(about.apart)}`, el("br"), position(place), el("br"), `68 % within ${metres(place.uncertainty_m)}`);
  map.placeCard(card, ...local(place));
}

const map = new CityMap($("map").firstElementChild, { paint, find, onHover, onKeep: (rank) => { if (rank !== null) select(rank); } });

// Ways to give a photo

function listen() {
  const files = (list) => { if (list?.length) ask(list[0]); };
  $("file").onchange = () => { files($("file").files); $("file").value = ""; };
  document.addEventListener("paste", (event) => files(event.clipboardData.files));
  const dragging = (on) => document.body.classList.toggle("dragging", on);
  document.addEventListener("dragover", (event) => { event.preventDefault(); dragging(true); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) dragging(false); });
  document.addEventListener("drop", (event) => { event.preventDefault(); dragging(false); files(event.dataTransfer.files); });
  $("fit").onclick = () => map.fit(boundsOf(about.cells));
  $("fit-answer").onclick = fitAnswer;
}

async function start() {
  try {
    about = await send("about");
  } catch (error) {
    return state("error", error.message);
  }
  $("summary").textContent = `A model names the place among ${count(about.cells.east.length)} cells of ${about.cells.M} m. ` +
    (about.private ? "Your photo stays on this computer and is not kept." : "Your photo is sent to this server and not kept.");
  $("ways").textContent += ` (${about.formats.join(", ")}; up to ${about.max_bytes / 1e6} MB and ${about.max_pixels / 1e6} megapixels)`;
  listen();
  $("within").textContent = `probability within ${metres(about.apart)}`;
  map.fit(boundsOf(about.cells));
  state("ready");
}
start();
