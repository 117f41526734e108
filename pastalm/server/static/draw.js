// Draws what page.js keeps in `state`: timeline, answer, numbers. What a model or a user wrote becomes text by
// textContent or as a text node, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, className, textContent = "") => Object.assign(document.createElement(tag), { className, textContent });
const seconds = (s) => `${s.toFixed(2)} s`;
const rows = new Map(), slots = new Map(); // by thread's name; kept, so that focus and pointer stay where they are
const keep = (map, name, made) => map.get(name) ?? map.set(name, made()).get(name);

// A thread's row or slot: known by its name, in its own colour.
function mark(element, run, name) {
  element.dataset.name = name;
  element.style.setProperty("--h", Math.round(77 + [...run.whole.threads.keys()].indexOf(name) * 137.5) % 360);
  return element;
}

function rowOf(run, name, { parent, topic }) {
  const row = mark(make("button", `row ${parent ? "chunk" : "main"}`), run, name);
  const lane = make("span", "lane"), count = make("span", "count");
  row.append(make("span", "name", name), make("span", "topic", topic), lane, count);
  $("rows").appendChild(make("li", "")).append(row);
  return Object.assign(row, { type: "button", lane, count });
}

function drawRow(run, name, thread, full) {
  const row = keep(rows, name, () => rowOf(run, name, thread)), now = run.shown.threads.get(thread.name), spans = [];
  const add = (className, from, to) => spans.push({ className, from, to: to ?? run.shown.steps });
  if (now?.parent) add("promise", now.startStep, run.whole.due(now));
  for (const { from, to } of now?.waits ?? []) add("wait", from, to);
  for (const { step, drafter, cell = drafter ? "guess" : "run" } of now?.slices ?? [])
    if (spans.at(-1)?.className === cell && spans.at(-1).to === step - 1) spans.at(-1).to = step;
    else add(cell, step - 1, step);
  row.lane.replaceChildren(...spans.map(({ className, from, to }) => {
    const span = make("span", className), left = run.at(from) / full;
    Object.assign(span.style, { left: `${left * 100}%`, width: `${(run.at(to) / full - left) * 100}%` });
    return span;
  }));
  row.count.textContent = now ? now.tokens.length + (now.promised ? `/${now.promised}` : "") : "";
  row.ariaLabel = now ? run.describe(now) : `${name}: not begun`;
}

// The axis: about eight round numbers.
function drawAxis(full) {
  const power = 10 ** Math.floor(Math.log10(full / 8)), round = [1, 2, 5, 10].find((n) => n * power >= full / 8);
  const [tick, unit] = state.unit === "step" ? [Math.max(1, round * power), ""] : [round * power, " s"];
  $("axis").replaceChildren(...Array.from({ length: Math.floor(full / tick + 1e-9) + 1 }, (_, i) => {
    const label = make("span", "", i || unit ? `${+(i * tick).toPrecision(3)}${unit}` : "step 0");
    label.style.left = `${((i * tick) / full) * 100}%`;
    return label;
  }));
}

function drawTimeline({ run, race }) {
  const threads = [...run.whole.threads.values()], alone = race?.whole.threads.get("main");
  const ends = (each) => [each.whole.steps, ...[...each.whole.threads.values()].map((t) => each.whole.due(t))];
  const full = Math.max(0.001, ...runs().flatMap((each) => ends(each).map((step) => each.at(step))));
  for (const thread of threads) drawRow(run, thread.name, thread, full);
  if (alone) drawRow(race, "sequential", alone, full);
  drawAxis(full);
  const x = (place) => ((place / full) * 1000).toFixed(1);
  const y = (name) => threads.findIndex((thread) => thread.name === name) + 0.5;
  const lines = run.shown.joins.map(({ name, step, children }) => {
    const at = [name, ...children].map(y);
    return ["join", `M${x(run.at(step))} ${Math.min(...at) - 0.42}V${Math.max(...at) + 0.42}`];
  });
  const path = run.shown.criticalSpans().map(({ name, from, to }, i) =>
    `${i ? "V" : `M${x(run.at(from - 1))} `}${y(name)}H${x(run.at(to))}`).join("");
  if (path) lines.push(["halo", path], ["critical", path]);
  const here = state.unit === "step" ? Math.max(...runs().map((each) => each.shown.steps)) : state.cursor;
  if (state.cursor !== null) lines.push(["now", `M${x(here)} 0V${rows.size}`]);
  $("over").setAttribute("viewBox", `0 0 1000 ${rows.size}`);
  document.body.style.setProperty("--rows", rows.size);
  $("over").replaceChildren(...lines.map(([name, d]) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [key, value] of [["class", name], ["d", d]]) line.setAttribute(key, value);
    return line;
  }));
}

function slotOf(run, { name, topic }) {
  const hint = Object.assign(make("span", "hint", topic), { ariaHidden: "true" });
  const slot = { tabIndex: 0, role: "group", ariaLabel: `chunk ${name}: ${topic}`, hint };
  return Object.assign(mark(make("span", "slot"), run, name), slot);
}

// Makes these an element's children (strings are text nodes), touching only what differs.
function reconcile(element, nodes) {
  nodes.forEach((node, i) => {
    const there = element.childNodes[i], text = typeof node === "string";
    if (text && there?.nodeType === Node.TEXT_NODE) there.data === node || (there.data = node);
    else if (there !== node) element.insertBefore(text ? document.createTextNode(node) : node, there ?? null);
  });
  while (element.childNodes.length > nodes.length) element.lastChild.remove();
}

// Fills a thread's element, its chunks' slots inside it. written: how many characters there is room for, and whether a
// line begins. Returns the line ends with which it closes, for its parent to write: no slot colours an empty line.
function fill(element, run, thread, written) {
  const nodes = [], write = (text) => nodes.push(typeof nodes.at(-1) === "string" ? nodes.pop() + text : text);
  for (const part of thread.parts) {
    if (written.room <= 0) break;
    if (typeof part === "string") {
      const text = characters(part).slice(0, written.room);
      written.room -= text.length;
      written.fresh = text.at(-1) === "\n";
      write(text.join(""));
      continue;
    }
    const child = run.shown.threads.get(part.child), slot = keep(slots, part.child, () => slotOf(run, child));
    const { fresh } = written, tail = fill(slot, run, child, written), open = run.open(child);
    nodes.push(slot);
    write(tail);
    slot.classList.toggle("block", fresh && (open || tail !== ""));
    slot.classList.toggle("open", open);
    slot.style.setProperty("--done", `${(child.tokens.length / (child.promised + CHUNK_TAGS)) * 100}%`);
    if (!open) continue;
    slot.append(slot.hint);
    written.fresh ||= fresh;
  }
  const tail = thread.parent && typeof nodes.at(-1) === "string" ? /\n*$/.exec(nodes.at(-1))[0] : "";
  if (tail) nodes.push(nodes.pop().slice(0, -tail.length));
  reconcile(element, nodes.filter((node) => node !== ""));
  return tail;
}

function drawAnswer(run) {
  const main = run.shown.threads.get("main");
  fill($("answer"), run, main ?? { parts: [] }, { room: run.shown.cut ?? Infinity, fresh: true });
  $("answer").ariaBusy = `${run.how === "running"}`;
  $("answer").classList.toggle("open", main?.state === "live" && run.open(main));
}

const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0), length = (t) => characters(t.text).length;
const FIGURES = {
  tokens: (t) => t.tokens, chunks: (t) => Math.max(0, t.threads.size - 1), steps: (t) => t.steps, length,
  critical: (t) => t.criticalPath, parallelism: (t) => t.parallelism.toFixed(2), seconds: (t) => seconds(t.seconds),
  rate: (t) => (t.seconds ? (t.tokens / t.seconds).toFixed(1) : ""),
  pass: (t) => (t.passes ? t.tokensPerPass.toFixed(2) : ""),
  guesses: (t) => (sum(t.drafted) ? `${sum(t.accepted)} of ${sum(t.drafted)} came true` : ""),
  first: ({ firstToken: at }) => (at === null ? "" : seconds(at)), wall: (_, { wall }) => (wall ? seconds(wall) : ""),
  end: (t) => ({ stop: "by itself", length: "at the limit of tokens", abort: "stopped" })[t.finishReason] ?? "",
};

function verdict(run, race) {
  if (race.how !== "done") return race.how === "running" ? "" : "The sequential answer broke off: nothing to compare.";
  const times = race.whole.seconds / run.whole.seconds, text = length(run.whole) / Math.max(1, length(race.whole));
  return `${times.toFixed(2)} times as fast as sequentially, with ${text.toFixed(2)} times the text` +
    `${text < 0.95 ? " (in part only a shorter answer)" : ""}: ${(times * text).toFixed(2)} times for each character.` +
    `${run.whole.threads.size > 1 ? "" : " It did not fork."}`;
}

function drawNumbers({ run, race }) {
  document.body.classList.toggle("racing", race !== null);
  for (const row of $("figures").rows) {
    const texts = [run, race].map((each) => each && `${FIGURES[row.dataset.figure](each.shown, each)}`);
    texts.forEach((text, i) => { row.cells[i + 1].textContent = text ?? ""; });
    row.hidden = !texts.some(Boolean);
  }
  $("which").hidden = $("tracks").hidden = !race;
  runs().forEach(({ shown }, i) => {
    const [, done, time] = $("tracks").children[i].children;
    done.style.width = `${(shown.seconds / Math.max(0.001, longest())) * 100}%`;
    time.textContent = seconds(shown.seconds);
  });
  $("verdict").textContent = race ? verdict(run, race) : "";
}
