const data = JSON.parse($("data").textContent);
const NOTHING = "Nothing was scored.";
const RIGHT = "var(--right)", WRONG = "var(--wrong)", ACCENT = "var(--accent)";
const LINES = ["#2456a6", "#c77700", "#16824a", "#8a3ea8", "#c8352b", "#4d5b6c"];

// Results

function nsOf(row) {
  return Object.keys(row).filter((name) => name.startsWith("lr_at_")).map((name) => Number(name.slice(6)));
}

function drawResults() {
  const ns = nsOf(data.rows[0]);
  const head = ["Checkpoint", "Queries", "Scores", ...ns.map((n) => `LR@${n}`), "Median", "90 % within", "Scored", "Photos/s", "Latency"];
  const table = $("result-table");
  table.append(el("tr", {}, ...head.map((text, i) => el("th", i < 3 ? { class: "text" } : {}, text))));
  data.rows.forEach((row, index) => {
    Object.entries(row.forms).forEach(([form, recall], i) => {
      const own = form === row.form;
      const cells = [el("td", { class: "text long", title: row.checkpoint }, i ? "" : row.checkpoint),
        el("td", { class: "text long", title: row.queries }, i ? "" : row.queries),
        el("td", { class: "text" }, form),
        ...ns.map((n) => el("td", own ? { id: `row-${index}-lr-at-${n}` } : {}, number(recall[`lr_at_${n}`])))];
      if (own) {
        cells.push(el("td", {}, metres(row.median_error_m)), el("td", {}, metres(row.p90_error_m)),
          el("td", {}, `${count(row.scored)} of ${count(row.photos)}`), el("td", {}, number(row.queries_per_second)),
          el("td", {}, `${number(row.latency_ms)} ms`));
      } else cells.push(...Array(5).fill(0).map(() => el("td")));
      table.append(el("tr", { class: (own ? "own" : "") + (i ? "" : " first") }, ...cells));
    });
    const asides = { chance: ns.map((n) => row.chance[`lr_at_${n}`]), ceiling: ns.map(() => row.ceiling) };
    for (const [name, values] of Object.entries(asides))
      table.append(el("tr", { class: "aside" }, el("td"), el("td"), el("td", { class: "text" }, name),
        ...values.map((value) => el("td", {}, number(value))), ...Array(5).fill(0).map(() => el("td"))));
  });
  $("result-note").textContent = `LR@N: percent of queries with one of the first N answers within ${data.rows[0].threshold_m} m. ` +
    "Chance: a random order of all classes. Ceiling: queries that some class's centre could answer at all. Bold: the scores behind the figures below.";
  for (const problem of data.problems) $("problems").append(el("li", {}, problem));
  $("origin").textContent = `Made by ${data.provenance.command} on ${data.provenance.time}, commit ` +
    `${data.provenance.commit ?? "unknown"}, ${Object.entries(data.provenance.packages).map((p) => p.join(" ")).join(", ")}.`;
}

const nameOf = (row) => `${row.checkpoint} on ${row.queries}`;

function drawSummary(row) {
  const n = nsOf(row)[0], several = data.rows.length > 1;
  $("summary").textContent = (several ? `${nameOf(row)}: ` : "") + (row.scored ?
    `${several ? "of" : "Of"} ${count(row.scored)} query photos ${number(row[`lr_at_${n}`])} % are placed within ${row.threshold_m} m ` +
    `${n === 1 ? "at the first answer" : `by one of the first ${n} answers`} (chance ${number(row.chance[`lr_at_${n}`])} %), ` +
    `among ${count(row.classes, "cell")} in ${count(row.groups, "group")}.` + (row.fitted ? " Form and confidence are fitted to these very queries." : "")
    : `${several ? "n" : "N"}othing was scored: no readable query has a known place.`);
}

// Charts: small SVGs, 520 x 260

function chart(width = 520, height = 260) {
  return el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
}
function label(svg, x, y, text, anchor = "middle", kind = "") {
  svg.append(el("text", { x, y, "text-anchor": anchor, class: kind }, text));
}
function percentAxis(svg, left, right, top, bottom, highest = 100) {
  for (let i = 0; i <= 4; i++) {
    const y = bottom - ((bottom - top) * i) / 4;
    svg.append(el("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }));
    label(svg, left - 6, y + 4, `${Math.round((highest * i) / 4)} %`, "end");
  }
}

function drawHistogram(view) {
  const threshold = view.row.threshold_m;
  const steps = [10, 50, 100, 200, 500, 1000, 2000, 5000, 10000].filter((m) => Math.abs(m - threshold) > 0.2 * threshold);
  const largest = Math.max(...view.scored.map((i) => view.answers.error[i]), threshold);
  const edges = [0, ...[...steps, threshold].sort((a, b) => a - b)];
  const used = edges.filter((edge, i) => i < 2 || edge < largest);
  const counts = used.map(() => 0);
  const within = (i, edge) => (edge === threshold ? view.isRight(i) : view.answers.error[i] <= edge);
  for (const i of view.scored) {
    let bin = used.length - 1;
    while (bin > 0 && within(i, used[bin])) bin--;
    counts[bin]++;
  }
  const svg = chart(), left = 44, right = 494, top = 18, bottom = 222, total = view.scored.length;
  const highest = Math.max(20, Math.ceil((100 * Math.max(...counts)) / total / 20) * 20);
  percentAxis(svg, left, right, top, bottom, highest);
  const step = (right - left) / used.length;
  counts.forEach((n, i) => {
    const share = (100 * n) / total, height = ((bottom - top) * share) / highest;
    svg.append(el("rect", { x: left + i * step + 3, width: step - 6, y: bottom - height, height, rx: 2,
      fill: used[i] < threshold ? RIGHT : WRONG, opacity: 0.85 }));
    if (n) label(svg, left + (i + 0.5) * step, bottom - height - 4, count(n), "middle", "value");
    label(svg, left + i * step, bottom + 16, used[i] >= 1000 ? `${used[i] / 1000}k` : used[i]);
  });
  label(svg, (left + right) / 2, 252, "metres from the first answer to the true position");
  $("histogram").replaceChildren(svg);
  $("error-note").textContent = `Half of the queries are at most ${metres(view.row.median_error_m)} off, ` +
    `90 % at most ${metres(view.row.p90_error_m)}; the mean is ${metres(view.row.mean_error_m)}. Green: within ${threshold} m.`;
}

function drawCurve(view) {
  const svg = chart(), left = 44, right = 494, top = 12, bottom = 222, curve = view.row.curve, xs = curve.metres;
  const place = (m) => left + ((right - left) * Math.log(m / xs[0])) / Math.log(xs.at(-1) / xs[0]);
  percentAxis(svg, left, right, top, bottom);
  for (const m of [5, 10, 25, 50, 100, 200, 500, 1000]) label(svg, place(m), bottom + 16, m);
  const at = place(Math.min(Math.max(view.row.threshold_m, xs[0]), xs.at(-1)));
  svg.append(el("line", { x1: at, x2: at, y1: top, y2: bottom, stroke: "#8994a3", "stroke-dasharray": "4 3" }));
  label(svg, (left + right) / 2, 252, "metres");
  const legend = el("div", { class: "legend" });
  nsOf(view.row).forEach((n, k) => {
    const path = xs.map((m, i) => `${i ? "L" : "M"}${place(m).toFixed(1)} ${(bottom - ((bottom - top) * curve[`lr_at_${n}`][i]) / 100).toFixed(1)}`);
    svg.append(el("path", { d: path.join(" "), fill: "none", stroke: LINES[k % LINES.length], "stroke-width": 2.2 }));
    legend.append(el("span", {}, el("i", { style: `background:${LINES[k % LINES.length]}` }), `LR@${n}`));
  });
  $("curve").replaceChildren(svg, legend);
}

function drawReliability(view) {
  const svg = chart(), left = 44, right = 494, top = 18, bottom = 222, bins = view.row.calibration;
  const x = (p) => left + ((right - left) * p) / 100, y = (p) => bottom - ((bottom - top) * p) / 100;
  percentAxis(svg, left, right, top, bottom);
  for (const bin of bins) {
    if (bin.right === null) continue;
    svg.append(el("rect", { x: x(bin.low) + 2, width: x(bin.high) - x(bin.low) - 4, y: y(bin.right), height: bottom - y(bin.right), fill: ACCENT, opacity: 0.75, rx: 2 }));
    label(svg, x((bin.low + bin.high) / 2), y(bin.right) - 4, count(bin.queries), "middle", "value");
  }
  svg.append(el("line", { x1: x(0), y1: y(0), x2: x(100), y2: y(100), stroke: WRONG, "stroke-dasharray": "5 4" }));
  for (let p = 0; p <= 100; p += 20) label(svg, x(p), bottom + 16, `${p} %`);
  label(svg, (left + right) / 2, 252, "confidence");
  const table = el("table", {}, el("tr", {}, ...["Confidence", "Queries", "Mean confidence", "Right"].map((t) => el("th", {}, t))),
    ...bins.filter((bin) => bin.queries).map((bin) => el("tr", {}, el("td", {}, `${number(bin.low, 0)} to ${number(bin.high, 0)} %`),
      el("td", {}, count(bin.queries)), el("td", {}, `${number(bin.confidence)} %`), el("td", {}, `${number(bin.right)} %`))));
  $("reliability").replaceChildren(svg, el("details", {}, el("summary", {}, "Reliability table"), table));
  $("calibration-note").textContent = `Bars: percent of the answers of that confidence that are right; numbers: how many there are. On the dashed line ` +
    `confidence is honest. Expected calibration error: ${number(view.row.calibration_error)} points; ` +
    (view.row.temperature ? `confidence calibrated on validation queries (temperature ${number(view.row.temperature, 2)}).` : "confidence not calibrated.") +
    ` The true place lies in the circle said to hold 68 % of the probability for ${number(view.row.percent_within_radius)} % of the queries.`;
}

function drawGroups(view) {
  $("groups").replaceChildren(el("table", {},
    el("tr", {}, ...["Group", "Classes", "Queries", "LR@1", "Share of answers"].map((t) => el("th", {}, t))),
    ...view.row.by_group.map((g) => el("tr", {},
      el("td", {}, el("span", { class: "key", style: `background:${groupColour(g.group, 0.9)}` }), ` ${g.group}`),
      el("td", {}, count(g.classes)), el("td", {}, count(g.queries)), el("td", {}, `${number(g.lr_at_1)} %`), el("td", {}, `${number(g.answers_share)} %`)))));
}

// Galleries

const picture = (set, i) => set.large[i] ?? set.thumbs[i] ?? "";

function drawGallery(view, id, items, empty) {
  const figures = items.map((item) => {
    const pictures = el("div", { class: "pictures" });
    const add = (source, tag) => { if (source) pictures.append(el("div", {}, el("img", { src: source, alt: tag, loading: "lazy" }), el("span", { class: "tag" }, tag))); };
    add(picture(view.set, item.i), "query");
    add(item.answer, "answer");
    add(item.truth, "true cell");
    const figure = el("figure", { tabindex: 0 }, pictures, el("figcaption", {}, ...facts(view, item.i)));
    figure.onclick = () => { show(item.i); $("map").scrollIntoView({ block: "center", behavior: "smooth" }); };
    return figure;
  });
  $(id).replaceChildren(...(figures.length ? figures : [el("p", { class: "note" }, empty)]));
}

function facts(view, i) {
  const { answers, set } = view, error = answers.error[i];
  const verdict = error === null ? el("span", {}, "true position unknown")
    : el("span", { class: view.isRight(i) ? "good" : "bad" }, `${metres(error)} off`);
  return [verdict, `, confidence ${number(answers.confidence[i])} %, 68 % within ${metres(answers.uncertainty[i])}`,
    el("div", { class: "name", title: set.photos[i] }, set.photos[i])];
}

// The map

const visible = (i) => {
  const shown = view.isRight(i) ? $("show-right").checked : $("show-wrong").checked;
  return view.set.east[i] !== null && view.answers.readable[i] && shown;
};

function paint(c, width, height) {
  if (!view) return;
  const { set, answers, cells } = view, many = set.photos.length > 3000;
  if ($("show-cells").checked) map.drawCells(c, cells);
  const shown = set.photos.map((_, i) => i).filter(visible);
  const kinds = [[colour("wrong"), many ? 0.15 : 0.3, shown.filter((i) => !view.isRight(i))], [colour("right"), 0.8, shown.filter(view.isRight)]];
  for (const [fill, alpha, some] of $("show-lines").checked ? kinds : []) {
    c.lineWidth = 1; c.strokeStyle = fill; c.globalAlpha = alpha;
    for (const i of some) {
      const [x, y] = map.toScreen(set.east[i], set.north[i]), [toX, toY] = map.toScreen(...cells.center(answers.top[i][0]));
      if (Math.max(x, toX) < 0 || Math.max(y, toY) < 0 || Math.min(x, toX) > width || Math.min(y, toY) > height) continue;
      c.beginPath(); c.moveTo(x, y); c.lineTo(toX, toY); c.stroke();
    }
  }
  c.globalAlpha = 1;
  const radius = Math.min(Math.max(map.scale * 2, 2), many ? 3 : 5);
  let drawn = 0;
  for (const [fill, , some] of kinds) {
    c.fillStyle = fill;
    for (const i of some) {
      const [x, y] = map.toScreen(set.east[i], set.north[i]);
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      c.beginPath(); c.arc(x, y, radius, 0, 7); c.fill();
      drawn++;
    }
  }
  map.drawScale(c);
  document.body.dataset.queriesOnMap = drawn;
}

function paintOver(c) {
  if (!view) return;
  const chosen = map.hovered ?? kept;
  if (chosen !== null) drawChosen(c, chosen);
  drawCard(chosen);
}

function drawChosen(c, i) {
  const { set, answers, cells } = view, known = set.east[i] !== null;
  answers.top[i].slice().reverse().forEach((row, back) => {
    const rank = answers.top[i].length - 1 - back, center = cells.center(row);
    if (known) {
      c.strokeStyle = rank ? colour("soft") : colour("ink"); c.lineWidth = rank ? 1 : 2.2;
      c.beginPath(); c.moveTo(...map.toScreen(set.east[i], set.north[i])); c.lineTo(...map.toScreen(...center)); c.stroke();
    }
    map.drawRank(c, ...center, cells.M, rank);
  });
  if (known) map.drawDot(c, set.east[i], set.north[i], colour(view.isRight(i) ? "right" : "wrong"));
}

function drawCard(i) {
  const card = $("card");
  card.hidden = i === null;
  if (i === null) return;
  const { set, answers, cells } = view, source = picture(set, i);
  card.replaceChildren(...(source ? [el("img", { src: source, alt: "" })] : []), ...facts(view, i));
  map.placeCard(card, ...(set.east[i] === null ? cells.center(answers.top[i][0]) : [set.east[i], set.north[i]]));
}

function find(px, py) {
  let best = null, least = 14 ** 2;
  for (let i = 0; i < view.set.photos.length; i++) {
    if (!visible(i)) continue;
    const [x, y] = map.toScreen(view.set.east[i], view.set.north[i]), d = (x - px) ** 2 + (y - py) ** 2;
    if (d < least) { least = d; best = i; }
  }
  return best;
}

function show(i) {
  const { set, cells, answers } = view, [ax, ay] = cells.center(answers.top[i][0]);
  const qx = set.east[i] ?? ax, qy = set.north[i] ?? ay;
  map.x = (qx + ax) / 2; map.y = (qy + ay) / 2;
  map.scale = Math.min(0.6 * Math.min(map.width / (Math.abs(qx - ax) + 1), map.height / (Math.abs(qy - ay) + 1)), 4);
  kept = i;
  map.draw();
}

let view = null, kept = null;
const map = new CityMap($("map").firstElementChild, { paint, paintOver, find, onKeep: (i) => { kept = i; } });

function openRow(index) {
  const row = data.rows[index], answers = data.answers[index], set = data.sets[answers.set], cells = data.cells[answers.cells];
  cells.center ??= (k) => [cells.east[k] * cells.M + Math.floor(cells.M / 2), cells.north[k] * cells.M + Math.floor(cells.M / 2)];
  const scored = set.photos.map((_, i) => i).filter((i) => answers.error[i] !== null);
  const isRight = (i) => Boolean(answers.right[i]); // errors are rounded
  view = { row, answers, set, cells, scored, isRight };
  drawSummary(row);
  for (const [id, draw] of Object.entries({ histogram: drawHistogram, curve: drawCurve, reliability: drawReliability, groups: drawGroups })) {
    $(id).previousElementSibling.hidden = !row.scored; // its note
    if (row.scored) draw(view); else $(id).replaceChildren(el("p", { class: "note" }, NOTHING));
  }
  drawGallery(view, "confident", answers.confident, row.scored ? "No mistakes." : NOTHING);
  drawGallery(view, "farthest", answers.farthest, row.scored ? "No mistakes." : NOTHING);
  drawGallery(view, "successes", answers.successes, row.scored ? "No successes." : NOTHING);
  map.hovered = kept = null;
  map.fit(boundsOf(cells));
}

drawResults();
$("fit").onclick = () => map.fit(boundsOf(view.cells));
for (const id of ["show-right", "show-wrong", "show-lines", "show-cells"]) $(id).onchange = () => map.draw();
data.rows.forEach((row, i) => $("row").append(el("option", { value: i }, nameOf(row))));
$("picker").hidden = data.rows.length < 2;
$("row").onchange = () => openRow(Number($("row").value));
const first = [(row) => row.scored && !row.fitted, (row) => row.scored, () => true].map((some) => data.rows.findIndex(some)).find((i) => i >= 0);
$("row").value = first;
openRow(first);
document.body.dataset.ready = "yes";
