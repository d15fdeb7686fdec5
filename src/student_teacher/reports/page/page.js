"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { measures, curves, images } = data; // images: the highest score first
const missing = measures.missing ?? {};
const unlabelled = images.length > 0 && images.every((image) => image.label === null);

// ---- Words and numbers

const OUTCOMES = {
  hit: ["hit", "hits"],
  miss: ["miss", "misses"],
  alarm: ["false alarm", "false alarms"],
  pass: ["correct pass", "correct passes"],
  flagged: ["flagged", "flagged"],
  unflagged: ["not flagged", "not flagged"],
};
const FILTERS = {
  all: ["All", Object.keys(OUTCOMES)],
  right: ["Right", ["hit", "pass"]],
  wrong: ["Wrong", ["miss", "alarm"]],
  alarm: ["False alarms", ["alarm"]],
  miss: ["Misses", ["miss"]],
  flagged: ["Flagged", ["flagged"]],
  unflagged: ["Not flagged", ["unflagged"]],
};
const TRUTHS = { 0: "good", 1: "defect", null: "unlabelled" };

function outcomeOf(image, flagged) {
  if (image.label === null) return flagged ? "flagged" : "unflagged";
  return image.label ? (flagged ? "hit" : "miss") : flagged ? "alarm" : "pass";
}

function significant(value, digits) {
  const text = value.toPrecision(digits);
  return text.includes("e") ? String(Number(text)) : text; // 1230 and not 1.23e+3
}
const rate = (value) => (value === undefined ? "–" : value.toFixed(3));
const plural = (count, one, many) => `${count} ${count === 1 ? one : many}`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function drawing(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// ---- The measures and their curves

function showMeasures() {
  const figures = [
    ["Image AU-ROC", "image_au_roc", "defective images score above good ones"],
    ["AU-PRO", "au_pro", `overlap with each region, up to a false positive rate of ${measures.au_pro_limit ?? 0.3}`],
    ["AU-sPRO", "au_spro_0.05", "overlap with regions that saturate, up to a false positive rate of 0.05"],
    ["AUPIMO", "aupimo", "share of a defect found, where good images have 1 to 10 false pixels in 100,000"],
    ["Pixel AU-ROC", "pixel_au_roc", "defect pixels score above good ones"],
    ["Average precision", "image_average_precision", "of the images"],
    ["Best F1", "image_best_f1", "of the images"],
    ["F1", "image_f1", "of the images, at the threshold of the decisions"],
    ["Pixel F1", "pixel_f1", "at the threshold of the decisions"],
  ];
  for (const [name, key, meaning] of figures) {
    const known = measures[key] !== undefined;
    if (!known && missing[key] === undefined) continue; // as AU-sPRO of most categories
    byId("measures").append(
      element("div", { className: known ? "" : "none" },
        element("dt", { textContent: name }),
        element("dd", { className: "figure", textContent: rate(measures[key]) }),
        element("dd", { className: "note", textContent: known ? meaning : missing[key] ?? "not measured" })),
    );
  }
  byId("evidence").hidden = unlabelled; // nothing can be measured
  const good = images.filter((image) => image.label === 0).length;
  const defects = images.filter((image) => image.label).length;
  const unknown = images.length - good - defects;
  const parts = [[good, "good"], [defects, "with a defect"], [unknown, "unlabelled"]].filter(([count]) => count);
  byId("contents").textContent =
    unlabelled ? plural(images.length, "image", "images")
      : `${plural(images.length, "test image", "test images")}: ${parts.map((part) => part.join(" ")).join(", ")}`;
}

function showCurves(id, drawn) {
  const plot = byId(id);
  const there = drawn.filter(([key]) => curves[key]);
  for (const [key, name, measure] of there) {
    plot.querySelector("svg").append(drawing("path", { class: `curve ${key}`, d: curves[key] }));
    plot.querySelector(".legend").append(element("span", { className: key, textContent: `${name} ${rate(measures[measure])}` }));
  }
  plot.hidden = !there.length; // the measures above say why
}

function showKinds() {
  const kinds = Object.entries(measures.kinds ?? {});
  if (!kinds.length) return;
  const columns = [
    ["Kind of\ndefect", (_, kind) => kind],
    ["Images", (row) => row.anomalous_images],
    ["Image\nAU-ROC", (row) => rate(row.image_au_roc)],
    ["Average\nprecision", (row) => rate(row.image_average_precision)],
    ["Pixel\nAU-ROC", (row) => rate(row.pixel_au_roc)],
    ["AU-PRO", (row) => rate(row.au_pro)],
    ["AU-sPRO", (row) => rate(row["au_spro_0.05"])],
    ["AUPIMO", (row) => rate(row.aupimo)],
  ].filter(([name]) => name !== "AU-sPRO" || measures["au_spro_0.05"] !== undefined);
  byId("kinds").hidden = false;
  byId("kinds").querySelector("thead tr").append(
    ...columns.map(([name]) => element("th", { scope: "col", textContent: name })));
  byId("kinds").querySelector("tbody").append(
    ...kinds.map(([kind, row]) => element("tr", {}, ...columns.map(([, value], index) => {
      const cell = element(index ? "td" : "th", { textContent: value(row, kind) });
      if (!index) cell.scope = "row";
      return cell;
    }))));
}

// ---- The axis of scores: logarithmic if they span a large range

const scores = images.map((image) => image.score);
const highest = scores[0] ?? 1;
const lowest = scores.at(-1) ?? 0;
const logarithmic = lowest > 0 && highest > 50 * lowest;
const onAxis = logarithmic ? Math.log : (score) => score;
const offAxis = logarithmic ? Math.exp : (place) => place;
// Room at both ends, where everything is flagged or nothing.
const room = 0.03 * (onAxis(highest) - onAxis(lowest)) || 0.5;
const axisStart = onAxis(lowest) - room;
const axisEnd = onAxis(highest) + room;
const placeOf = (score) => (onAxis(score) - axisStart) / (axisEnd - axisStart);
const scoreAt = (place) => offAxis(axisStart + place * (axisEnd - axisStart));

function showStrip() {
  const lanes = new Map();
  for (const image of images) {
    const key = `${image.label} ${image.kind}`;
    if (!lanes.has(key)) lanes.set(key, { image, places: [] });
    lanes.get(key).places.push(placeOf(image.score));
  }
  const order = [...lanes.values()].sort((a, b) =>
    (a.image.label ?? 2) - (b.image.label ?? 2) || a.image.kind.localeCompare(b.image.kind));
  for (const { image, places } of order) {
    // Spread by a sequence that fills the lane evenly, instead of at random: the same picture each time.
    const dots = places.map((place, index) => `M${(1000 * place).toFixed(1)} ${(20 + 60 * ((index * 0.618034) % 1)).toFixed(0)}h.01`);
    const lane = drawing("svg", { class: "lane", viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" });
    lane.append(drawing("path", { class: `dots ${TRUTHS[image.label]}`, d: dots.join("") }));
    byId("strip").append(element("span", { className: "lane-name", textContent: `${image.kind} (${places.length})` }), lane);
  }
}

// ---- Cards

const cards = []; // beside images: {item, outcome element, outcome, dialog's position}
const counts = Object.fromEntries(Object.keys(OUTCOMES).map((outcome) => [outcome, 0]));
const possible = new Set(images.flatMap((image) => [outcomeOf(image, true), outcomeOf(image, false)]));
let flaggedCount = 0;
let threshold = Infinity;
let filter = FILTERS.all[1];

function outlineOf(image) {
  const outline = drawing("svg", { class: "outline", viewBox: image.outline_box, preserveAspectRatio: "none", "aria-hidden": "true" });
  outline.append(drawing("path", { d: image.outline, class: "under" }), drawing("path", { d: image.outline }));
  return outline;
}

function showCards() {
  const ratios = images.map((image) => image.width / image.height).sort((a, b) => a - b);
  const frame = Math.min(1.8, Math.max(0.6, ratios[Math.floor(ratios.length / 2)] ?? 1));
  byId("gallery").style.setProperty("--frame", frame);
  const list = document.createDocumentFragment();
  for (const image of images) {
    const item = byId("card").content.firstElementChild.cloneNode(true);
    const [layers, picture, map] = [".layers", ".image", ".map"].map((name) => item.querySelector(name));
    layers.style.setProperty("--ratio", image.width / image.height);
    picture.src = `page/${image.file}_small.jpg`;
    map.src = `page/${image.file}_map.png`;
    if (image.outline) layers.append(outlineOf(image));
    item.querySelector(".score").textContent = significant(image.score, 3);
    item.querySelector(".kind").textContent = image.kind;
    item.querySelector(".kind").classList.add(TRUTHS[image.label]);
    item.querySelector(".name").textContent = image.name;
    const card = { item, text: item.querySelector(".outcome"), outcome: null };
    cards.push(card);
    setOutcome(cards.length - 1, false);
    list.append(item);
  }
  byId("gallery").append(list);
}

function setOutcome(index, flagged) {
  const card = cards[index];
  if (card.outcome) counts[card.outcome]--;
  card.outcome = outcomeOf(images[index], flagged);
  counts[card.outcome]++;
  card.item.dataset.outcome = card.outcome;
  card.text.textContent = OUTCOMES[card.outcome][0];
  setShown(index);
}

function setShown(index) {
  const kind = byId("kind").value;
  const hidden = !filter.includes(cards[index].outcome) || (kind !== "" && images[index].kind !== kindNames[kind]);
  if (cards[index].item.hidden !== hidden) cards[index].item.hidden = hidden;
}

// ---- Threshold: an image counts as defective where its score is at or above it

const start = () => data.threshold ?? measures.image_best_f1_threshold;

function setThreshold(value) {
  threshold = value;
  const above = scores.findIndex((score) => score < value);
  const flagged = above < 0 ? scores.length : above;
  // Sorted by score: only the cards between the old and the new place change.
  const [from, to] = [Math.min(flagged, flaggedCount), Math.max(flagged, flaggedCount)];
  for (let index = from; index < to; index++) setOutcome(index, index < flagged);
  flaggedCount = flagged;

  const place = Math.min(1, Math.max(0, placeOf(value)));
  byId("threshold").value = place;
  byId("threshold").setAttribute("aria-valuetext", significant(value, 4));
  byId("strip").style.setProperty("--place", place);
  byId("value").textContent = significant(value, 4);
  byId("best").disabled = value === start();
  showCounts();
}

function showCounts() {
  for (const outcome of possible) byId(`count-${outcome}`).textContent = counts[outcome];
  for (const input of byId("outcomes").querySelectorAll("input")) {
    const count = FILTERS[input.value][1].reduce((sum, outcome) => sum + counts[outcome], 0);
    input.nextElementSibling.textContent = count;
  }
  byId("empty").hidden = cards.some((card) => !card.item.hidden);
  announce();
}

let announcement;
function announce() {
  clearTimeout(announcement);
  // Once the slider rests, not at each of its steps.
  announcement = setTimeout(() => {
    const words = [...possible].map((outcome) => plural(counts[outcome], ...OUTCOMES[outcome]));
    const shown = cards.filter((card) => !card.item.hidden).length;
    byId("live").textContent = `Threshold ${significant(threshold, 4)}: ${words.join(", ")}. ${plural(shown, "image", "images")} shown.`;
  }, 400);
}

function makeThreshold() {
  for (const outcome of Object.keys(OUTCOMES).filter((outcome) => possible.has(outcome))) {
    byId("counts").append(element("div", { className: outcome },
      element("dt", { textContent: OUTCOMES[outcome][1] }),
      element("dd", { id: `count-${outcome}`, textContent: "0" })));
  }
  const slider = byId("threshold");
  slider.addEventListener("input", () => setThreshold(scoreAt(Number(slider.value))));
  slider.addEventListener("keydown", (event) => {
    // To the next score: every step of a key changes something.
    let target;
    if (["ArrowRight", "ArrowUp"].includes(event.key)) target = scores.findLast((score) => score > threshold) ?? scoreAt(1);
    else if (["ArrowLeft", "ArrowDown"].includes(event.key)) target = scores.find((score) => score < threshold) ?? scoreAt(0);
    else return;
    event.preventDefault();
    setThreshold(target);
  });
  const best = start();
  byId("best").hidden = best === undefined;
  if (data.threshold !== null) {
    byId("best").textContent = "as decided";
    byId("best").title = "the threshold of the decisions that were made";
  }
  byId("best").addEventListener("click", () => setThreshold(best));
  if (best === undefined && !unlabelled) {
    byId("no-best").hidden = false;
    byId("no-best").textContent = `No best F1 to start from: ${missing.image_best_f1 ?? "not measured"}.`;
  }
  setThreshold(best ?? scoreAt(1));
}

// ---- Filters

const kindNames = [...new Set(images.map((image) => image.kind))].sort((a, b) => a.localeCompare(b));

function makeFilters() {
  for (const [value, [name, outcomes]] of Object.entries(FILTERS)) {
    if (!outcomes.some((outcome) => possible.has(outcome))) continue;
    const input = element("input", { type: "radio", name: "outcome", value, checked: value === "all" });
    byId("outcomes").append(element("label", {}, input, `${name} `, element("span", { className: "count" })));
    input.addEventListener("change", () => {
      filter = outcomes;
      applyFilters();
    });
  }
  // By number: an option's value must not be mistaken for "all", whatever the kind is called.
  byId("kind").append(...kindNames.map((kind, index) => element("option", { value: index, textContent: kind })));
  byId("kind").addEventListener("change", applyFilters);
  for (const layer of ["maps", "outlines"]) {
    byId(layer).addEventListener("change", () => byId("gallery").classList.toggle(`no-${layer}`, !byId(layer).checked));
  }
  const masks = images.some((image) => image.outline);
  byId("outlines-label").hidden = byId("mask-label").hidden = !masks;
}

function applyFilters() {
  for (let index = 0; index < cards.length; index++) setShown(index);
  showCounts();
}

// ---- One image, large

const viewer = byId("viewer");
const stage = viewer.querySelector(".layers");
let open = null; // the image's index

const shownIndices = () => cards.flatMap((card, index) => (card.item.hidden ? [] : [index]));

function view(index) {
  open = index;
  const image = images[index];
  const shown = shownIndices();
  const position = shown.indexOf(index);
  const aupimo = measures.aupimo_of_images?.[`test/${image.kind}/${image.name}`];
  byId("viewer-name").textContent = `${image.kind} / ${image.name}`;
  byId("viewer-facts").replaceChildren(
    element("strong", { textContent: `score ${significant(image.score, 4)}` }),
    ` · ${OUTCOMES[cards[index].outcome][0]} at ${significant(threshold, 4)} · `,
    aupimo === undefined ? "" : `AUPIMO ${rate(aupimo)} · `,
    element("span", { textContent: `${position + 1} of ${shown.length}` }));
  stage.style.setProperty("--ratio", image.width / image.height);
  stage.querySelector(".outline")?.remove();
  if (image.outline) stage.append(outlineOf(image));
  stage.querySelector(".image").src = `page/${image.file}.jpg`;
  stage.querySelector(".image").alt = `${image.kind} / ${image.name}`;
  stage.querySelector(".map").src = `page/${image.file}_map.png`;
  byId("previous").disabled = position <= 0;
  byId("next").disabled = position + 1 >= shown.length;
  for (const neighbour of [shown[position + 1], shown[position - 1]]) {
    if (neighbour !== undefined) new Image().src = `page/${images[neighbour].file}.jpg`;
  }
  if (!viewer.open) {
    viewer.showModal();
    byId("viewer-name").focus();
  }
}

function step(by) {
  const shown = shownIndices();
  const next = shown[shown.indexOf(open) + by];
  if (next !== undefined) view(next);
}

function makeViewer() {
  byId("gallery").addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) view(cards.findIndex((card) => card.item === item));
  });
  byId("gallery").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const buttons = shownIndices().map((index) => cards[index].item.firstElementChild);
    const next = buttons[buttons.indexOf(document.activeElement) + by];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.target === byId("fader")) return; // there the arrows move the fader
    if (event.key === "ArrowRight") step(1);
    else if (event.key === "ArrowLeft") step(-1);
  });
  viewer.addEventListener("close", () => cards[open].item.firstElementChild.focus());
  const fade = () => stage.style.setProperty("--map", byId("fader").value);
  byId("fader").addEventListener("input", fade);
  fade();
  byId("mask").addEventListener("change", () => stage.classList.toggle("no-outlines", !byId("mask").checked));
}

showMeasures();
showCurves("roc", [["image_roc", "image", "image_au_roc"], ["pixel_roc", "pixel", "pixel_au_roc"]]);
showCurves("pro", [["pro", "AU-PRO", "au_pro"]]);
byId("pro").querySelector(".limit").textContent = measures.au_pro_limit ?? 0.3;
showKinds();
showStrip();
makeFilters();
showCards();
makeThreshold();
makeViewer();
