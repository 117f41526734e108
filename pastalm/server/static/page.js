// The page: one stream of events (of this server, or of a trace file) drawn as timeline, answer and numbers. What a
// model or a user wrote becomes text by textContent or a text node, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const LOCAL = location.protocol === "file:";
const state = {
  run: null, race: null, // what is drawn: an answer, and the sequential one beside it
  unit: "step", // of the axis: step or time, as the events call them
  cursor: null, // how far it is shown, in that unit; null: as far as it goes
  playing: null, which: "run", hot: null, model: null, abort: null, queued: false,
};

const make = (tag, className, text) => Object.assign(document.createElement(tag), { className, textContent: text ?? "" });
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const seconds = (s) => `${s.toFixed(2)} s`;
const runs = () => [state.run, state.race].filter(Boolean);

// One answer: its events, folded as they come, or as far as the cursor stands.
class Run {
  constructor(state = "running") {
    Object.assign(this, { events: [], whole: new Transcript(), state, begun: performance.now(), wall: null });
  }
  take(event) {
    this.whole.apply(event);
    this.events.push(event);
  }
  end(how) {
    this.state = how;
    this.wall = (performance.now() - this.begun) / 1000;
  }
  get shown() {
    if (state.cursor === null) return this.whole;
    const after = this.events.findIndex((event) => event[state.unit] > state.cursor);
    const count = after < 0 ? this.events.length : after;
    if (this.kept?.count !== count) this.kept = { count, part: new Transcript(this.events.slice(0, count)) };
    return this.kept.part;
  }
  get last() { return state.unit === "step" ? this.whole.steps : this.whole.seconds; }
  // Where a step stands on the axis.
  at(step) { return state.unit === "step" ? step : this.whole.timeAt(step); }
}

// ------------------------------------------------------------------ timeline

const hues = (transcript) => {
  const chunks = [...transcript.threads.keys()].filter((name) => name !== "main");
  return new Map(chunks.map((name, i) => [name, Math.round(215 + i * 137.5) % 360]));
};
const extent = () => Math.max(state.unit === "step" ? 1 : 0.001, ...runs().flatMap((run) =>
  [run.last, ...[...run.whole.threads.values()].map((thread) => run.at(run.whole.due(thread)))]));

const rows = new Map();
function rowOf(name, thread, hue) {
  if (rows.has(name)) return rows.get(name);
  const button = make("button", `row ${thread.parent ? "chunk" : "main"}`);
  button.type = "button";
  button.dataset.name = name;
  if (hue !== undefined) button.style.setProperty("--h", hue);
  const row = { button, lane: make("span", "lane"), count: make("span", "count") };
  const label = name === "race" ? "sequential" : name;
  button.append(make("span", "name", label), make("span", "topic", thread.topic), row.lane, row.count);
  const item = make("li", "");
  item.append(button);
  $("rows").append(item);
  rows.set(name, row);
  if (name !== "race" && rows.has("race")) $("rows").append(rows.get("race").button.parentNode);
  return row;
}

function bar(className, from, to, full) {
  const piece = make("span", className);
  piece.style.left = `${(from / full) * 100}%`;
  piece.style.width = `${(Math.max(0, to - from) / full) * 100}%`;
  return piece;
}

// A thread's stretches of decoding, in steps.
function stretches(thread) {
  const found = [];
  for (const { step } of thread.slices) {
    if (found.length && found.at(-1)[1] === step - 1) found.at(-1)[1] = step;
    else found.push([step - 1, step]);
  }
  return found;
}

function wordOf(thread, run) {
  if (thread.state === "done") return { stop: "done", length: "cut", abort: "stopped" }[thread.reason];
  return run.state === "running" || run.shown !== run.whole ? thread.state : "stopped";
}

function describe(thread, run) {
  const transcript = run.shown, end = thread.endStep ?? transcript.steps;
  const said = [thread.promised ? `${thread.tokens.length} tokens of ${thread.promised} promised` : plural(thread.tokens.length, "token")];
  said.push(`steps ${thread.startStep} to ${end}`);
  said.push(`${transcript.timeAt(thread.startStep).toFixed(2)} to ${seconds(transcript.timeAt(end))}`);
  const waited = thread.waits.reduce((sum, wait) => sum + (wait.to ?? transcript.steps) - wait.from, 0);
  if (waited) said.push(`waited ${plural(waited, "step")}`);
  const who = run === state.race ? "sequential" : thread.topic ? `${thread.name}, ${thread.topic}` : thread.name;
  return `${who}: ${said.join(", ")}, ${wordOf(thread, run)}`;
}

function drawRow(name, run, thread, full, hue) {
  const row = rowOf(name, thread, hue), now = run.shown.threads.get(thread.name);
  const pieces = [];
  if (thread.parent && now) pieces.push(bar("promise", run.at(thread.startStep), run.at(run.whole.due(thread)), full));
  for (const { from, to } of now?.waits ?? [])
    pieces.push(bar("wait", run.at(from), run.at(to ?? run.shown.steps), full));
  for (const [from, to] of now ? stretches(now) : []) pieces.push(bar("run", run.at(from), run.at(to), full));
  row.lane.replaceChildren(...pieces);
  row.count.textContent = now ? `${now.tokens.length}${thread.promised ? `/${thread.promised}` : ""}` : "";
  row.button.setAttribute("aria-label", now ? describe(now, run) : `${name}: not begun`);
  row.button.classList.toggle("yet", !now);
}

function drawTimeline() {
  const full = extent(), colour = hues(state.run.whole), names = [...state.run.whole.threads.keys()];
  for (const thread of state.run.whole.threads.values()) drawRow(thread.name, state.run, thread, full, colour.get(thread.name));
  const alone = state.race?.whole.threads.get("main");
  if (alone) drawRow("race", state.race, alone, full);
  const count = rows.size, transcript = state.run.shown;
  const x = (step) => ((state.run.at(step) / full) * 1000).toFixed(1), y = (name) => names.indexOf(name) + 0.5;
  const lines = [];
  const tick = [1, 2, 5].flatMap((n) => [-2, -1, 0, 1, 2, 3].map((e) => n * 10 ** e)).sort((a, b) => a - b)
    .find((each) => full / each <= 8 && (state.unit === "time" || each >= 1)) ?? full;
  const ticks = Array.from({ length: Math.floor(full / tick) + 1 }, (_, i) => i * tick);
  $("axis").replaceChildren(...ticks.map((value) => {
    const said = state.unit === "step" ? `${value}` : `${+value.toFixed(2)} s`;
    const label = make("span", "", value ? said : state.unit === "step" ? "step 0" : "0 s");
    label.style.left = `${(value / full) * 100}%`;
    return label;
  }));
  for (const value of ticks) lines.push(["grid", `M${((value / full) * 1000).toFixed(1)} 0V${count}`]);
  for (const { name, step, children } of transcript.joins) {
    const at = [name, ...children].map(y);
    lines.push(["join", `M${x(step)} ${Math.min(...at) - 0.42}V${Math.max(...at) + 0.42}`]);
  }
  const path = transcript.criticalSpans().map(({ name, from, to }, i) =>
    `${i ? "V" : `M${x(from - 1)} `}${y(name)}H${x(to)}`).join("");
  if (path) lines.push(["halo", path], ["critical", path]);
  if (state.cursor !== null) lines.push(["now", `M${((state.cursor / full) * 1000).toFixed(1)} 0V${count}`]);
  $("over").setAttribute("viewBox", `0 0 1000 ${count}`);
  $("over").firstElementChild.replaceChildren(...lines.map(([className, d]) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("class", className);
    line.setAttribute("d", d);
    return line;
  }));
}

// ------------------------------------------------------------------ answer

const slots = new Map();
function slotOf(thread, hue) {
  if (slots.has(thread.name)) return slots.get(thread.name);
  const slot = make("span", "slot");
  Object.assign(slot, { tabIndex: 0, role: "group", ariaLabel: `chunk ${thread.name}: ${thread.topic}` });
  slot.dataset.name = thread.name;
  slot.style.setProperty("--h", hue);
  slot.hint = make("span", "hint");
  slot.hint.ariaHidden = "true";
  slots.set(thread.name, slot);
  return slot;
}

// Makes an element's children these (strings are text nodes), touching only what differs.
function reconcile(element, nodes) {
  nodes.forEach((node, i) => {
    const there = element.childNodes[i];
    if (typeof node === "string" && there?.nodeType === Node.TEXT_NODE) {
      if (there.data !== node) there.data = node;
    } else if (there !== node) {
      element.insertBefore(typeof node === "string" ? document.createTextNode(node) : node, there ?? null);
    }
  });
  while (element.childNodes.length > nodes.length) element.lastChild.remove();
}

// Fills a thread's element, its chunks' slots inside it. written: how much may still be written, and its last character.
// Returns the line ends with which it closes: they are its parent's to write, so that no slot colours an empty line.
function fill(element, run, thread, colour, written) {
  const nodes = [];
  const write = (text) => {
    if (typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + text);
    else if (text) nodes.push(text);
  };
  for (const part of thread.parts) {
    if (typeof part === "string") {
      const text = written.left === Infinity ? part : characters(part).slice(0, written.left).join("");
      written.left -= text === part && written.left === Infinity ? 0 : characters(text).length;
      written.last = text.at(-1) ?? written.last;
      write(text);
    } else if (part.child && written.left > 0) {
      const child = run.shown.threads.get(part.child), slot = slotOf(child, colour.get(part.child));
      const begins = written.last === "\n", open = child.state !== "done" && wordOf(child, run) !== "stopped";
      nodes.push(slot);
      const tail = fill(slot, run, child, colour, written);
      slot.begins = begins;
      slot.classList.toggle("block", begins && (open || tail !== ""));
      slot.classList.toggle("open", open);
      slot.style.setProperty("--done", `${Math.min(100, (child.tokens.length / (child.promised + CHUNK_TAGS)) * 100)}%`);
      if (open) {
        slot.hint.textContent = slot.textContent.replace(slot.hint.textContent, "") ? "" : `${child.topic} …`;
        slot.append(slot.hint);
        if (begins) written.last = "\n";
      }
      write(tail);
    }
  }
  const last = nodes.at(-1), tail = typeof last === "string" && element !== $("answer") ? /\n*$/.exec(last)[0] : "";
  if (tail) nodes.push(nodes.pop().slice(0, -tail.length));
  reconcile(element, nodes.filter((node) => node !== ""));
  return tail;
}

function drawAnswer() {
  const run = (state.which === "race" && state.race) || state.run;
  const main = run.shown.threads.get("main"), box = $("answer");
  box.ariaBusy = String(run.state === "running");
  if (!main) return box.replaceChildren();
  fill(box, run, main, hues(run.whole), { left: run.shown.cut ?? Infinity, last: "\n" });
  const last = box.lastChild; // the end of the answer ends a line too
  if (last?.begins && last.classList.contains("slot")) last.classList.add("block");
  box.classList.toggle("open", main.state === "live" && run.state === "running");
}

// ------------------------------------------------------------------ numbers

const length = (transcript) => characters(transcript.text).length;
const FIGURES = [
  ["tokens", (t) => t.tokens], ["chunks", (t) => Math.max(0, t.threads.size - 1)], ["steps", (t) => t.steps],
  ["critical path", (t) => t.criticalPath], ["parallelism", (t) => t.parallelism.toFixed(2)],
  ["time", (t) => seconds(t.seconds)],
  ["to first token", (t) => (t.firstToken === null ? "–" : seconds(t.firstToken))],
  ["tokens/s", (t) => (t.seconds ? (t.tokens / t.seconds).toFixed(1) : "–")],
  ["characters of text", length],
  ["time, seen from here", (t, run) => (run.wall ? seconds(run.wall) : "–")],
];

function verdict() {
  const { run, race } = state;
  if (!race) return "";
  if (race.state === "running") return "The sequential answer is being decoded.";
  if (run.state !== "done" || race.state !== "done") return "One of the two did not end: there is nothing to compare.";
  const times = race.whole.seconds / run.whole.seconds, longer = length(run.whole) / Math.max(1, length(race.whole));
  const said = [`${times.toFixed(2)} times as fast as sequentially: ${seconds(run.whole.seconds)} against ${seconds(race.whole.seconds)}.`];
  said.push(`Its text is ${longer.toFixed(2)} times as long${longer < 0.95 ? ": part of this is a shorter answer, no speedup" : ""};`);
  said.push(`for each character ${(times * longer).toFixed(2)} times as fast.`);
  if (run.whole.threads.size === 1) said.push("It did not fork.");
  if (run.beside) said.push("Both ran at once and slowed each other.");
  return said.join(" ");
}

function drawNumbers() {
  const both = [state.run, state.race];
  document.body.classList.toggle("racing", Boolean(state.race));
  $("figures").replaceChildren(...FIGURES.map(([name, value]) => {
    const row = make("tr", ""), head = make("th", "", name);
    head.scope = "row";
    row.append(head, ...both.map((run, i) => make("td", i ? "raced" : "", run ? `${value(run.shown, run)}` : "")));
    return row;
  }));
  const most = Math.max(0.001, ...runs().map((run) => run.whole.seconds));
  $("tracks").replaceChildren(...(state.race ? both : []).map((run, i) => {
    const track = make("div", i ? "track alone" : "track"), fill = make("i", "");
    fill.style.width = `${(run.shown.seconds / most) * 100}%`;
    track.append(make("span", "", i ? "sequential" : "asynchronous"), fill, make("span", "", seconds(run.shown.seconds)));
    return track;
  }));
  $("verdict").textContent = verdict();
}

// ------------------------------------------------------------------ drawing, scrubbing, playing

function draw() {
  state.queued = false;
  if (!state.run) return;
  if (state.playing) advance();
  drawTimeline();
  drawAnswer();
  drawNumbers();
  const most = Math.max(...runs().map((run) => run.last)), value = state.cursor ?? most;
  Object.assign($("scrub"), { max: most, step: state.unit === "step" ? 1 : "any", value });
  $("place").textContent = state.unit === "step" ? `step ${Math.floor(value)}` : seconds(value);
  $("scrub").ariaValueText = `${$("place").textContent} of ${state.unit === "step" ? most : seconds(most)}`;
  $("play").textContent = state.playing ? "❚❚" : "▶";
  $("play").ariaLabel = state.playing ? "Pause" : "Play";
  $("which").hidden = !state.race;
  for (const id of ["save", "perfetto"]) $(id).disabled = !state.run.events.length;
  light(state.hot);
  if (state.playing) later();
}

function later() {
  if (!state.queued) requestAnimationFrame(draw);
  state.queued = true;
}

// Moves the cursor on to where the clock says; in steps, as fast as steps went on average.
function advance() {
  const { from, begun, speed } = state.playing, longest = runs().reduce((a, b) => (b.whole.seconds > a.whole.seconds ? b : a));
  const pace = state.unit === "step" ? longest.whole.steps / Math.max(0.001, longest.whole.seconds) : 1;
  state.cursor = from + ((performance.now() - begun) / 1000) * speed * pace;
  if (state.cursor >= Math.max(...runs().map((run) => run.last))) state.cursor = state.playing = null;
}

function play(from) {
  state.playing = { from, begun: performance.now(), speed: Number($("speed").value) };
  state.cursor = from;
  later();
}

// Marks a thread and its chunk, wherever they stand.
function light(name) {
  const known = name && (rows.has(name) || slots.has(name));
  state.hot = known ? name : null;
  document.body.classList.toggle("pointing", Boolean(known));
  for (const each of document.querySelectorAll("[data-name]")) each.classList.toggle("hot", each.dataset.name === state.hot);
  const run = name === "race" ? state.race : state.run, thread = run?.shown.threads.get(name === "race" ? "main" : name);
  $("detail").textContent = known && thread ? describe(thread, run)
    : "Point at a thread or a chunk, or move to one with Tab; Enter goes to its text.";
}

// What is drawn from now on.
function show(run) {
  Object.assign(state, { run, race: null, cursor: null, playing: null, which: "run", hot: null });
  document.querySelector("[name=which][value=run]").checked = true;
  rows.clear();
  slots.clear();
  $("rows").replaceChildren();
  $("answer").replaceChildren();
  document.querySelector("main").hidden = false;
  $("empty").hidden = true;
  later();
}

function complain(message) {
  $("error").textContent = String(message).replace(/\s+/g, " ");
  $("error").hidden = !message;
}

// ------------------------------------------------------------------ the server

const headers = () => ({ "Content-Type": "application/json", ...($("key").value && { Authorization: `Bearer ${$("key").value}` }) });

async function asked(path, options) {
  const reply = await fetch(path, { headers: headers(), ...options }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached: is it still running?");
  });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  if (reply.status === 401) $("keyed").hidden = false;
  if (reply.status === 401) $("key").focus();
  throw new Error(told?.error?.message ?? `the server answered ${reply.status} ${reply.statusText}`);
}

async function model() {
  state.model ??= (await (await asked("v1/models")).json()).data[0].id;
  $("model").textContent = state.model;
}

// Decodes a prompt and feeds its events to a run.
async function stream(run, body, signal) {
  try {
    const reply = await asked("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "", over = false;
    for (let part; !(part = await reader.read()).done; later()) {
      const lines = (held + part.value).split("\n");
      held = lines.pop();
      for (const line of lines.filter((each) => each.startsWith("data: "))) {
        if (line === "data: [DONE]") { over = true; continue; }
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        for (const event of chunk.pasta?.events ?? []) run.take(event);
      }
    }
    if (!over) throw new Error("the stream broke off before its end");
    run.end("done");
  } catch (error) {
    run.end(signal.aborted ? "cancelled" : "failed");
    if (!signal.aborted) throw error.name === "TypeError" ? new Error("the connection broke off") : error;
  } finally {
    later();
  }
}

async function decode() {
  const value = (id, key) => ($(id).value === "" ? {} : { [key]: Number($(id).value) });
  const body = (more) => ({
    model: state.model, messages: [{ role: "user", content: $("prompt").value }], stream: true,
    ...value("temperature", "temperature"), ...value("seed", "seed"), ...value("most", "max_tokens"),
    pasta: { events: true, ...value("odds", "parallelism"), ...more },
  });
  const how = $("race").value, run = new Run(), alone = body({ parallelism: 0 }), { signal } = state.abort = new AbortController();
  const race = () => stream(state.race = new Run(), alone, signal);
  complain("");
  working("decoding");
  try {
    await model();
    const first = body({});
    alone.model = state.model;
    show(run);
    run.beside = how === "beside";
    const both = [stream(run, first, signal), ...(run.beside ? [race()] : [])];
    const failed = (await Promise.allSettled(both)).find((each) => each.reason);
    if (failed) throw failed.reason;
    if (how === "after" && !signal.aborted) {
      working("decoding it once more, sequentially");
      await race();
    }
  } catch (error) {
    if (!signal.aborted) complain(error.message);
  } finally {
    working("", signal.aborted ? "cancelled" : "");
  }
}

function working(what, end = "") {
  $("send").hidden = Boolean(what);
  $("cancel").hidden = !what;
  $("status").textContent = what ? `${what} …` : end || (state.run?.state === "done" ? "done" : "");
}

// ------------------------------------------------------------------ files

function save(name, parts, type) {
  const link = make("a", ""), url = URL.createObjectURL(new Blob(parts, { type }));
  Object.assign(link, { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function load(file) {
  try {
    const events = parseTrace(await file.text()), run = new Run("done");
    for (const event of events) run.take(event);
    state.abort?.abort();
    complain("");
    show(run);
    $("model").textContent = file.name;
    $("status").textContent = "";
  } catch (error) {
    complain(`${file.name} is no trace: ${error.message}`);
  }
}

// ------------------------------------------------------------------ what people do

const drawn = () => (state.which === "race" && state.race) || state.run;
$("ask").onsubmit = (event) => { event.preventDefault(); if (!$("send").hidden) decode(); };
$("cancel").onclick = () => state.abort.abort();
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
$("key").onchange = () => model().then(() => complain(""), (error) => complain(error.message));
$("open").onclick = () => $("file").click();
$("file").onchange = () => { if ($("file").files.length) load($("file").files[0]); $("file").value = ""; };
$("save").onclick = () => save("trace.jsonl", drawn().events.map((event) => `${JSON.stringify(event)}\n`), "application/x-ndjson");
$("perfetto").onclick = () =>
  save("trace.perfetto.json", [JSON.stringify(perfetto(drawn().whole, $("model").textContent))], "application/json");
$("play").onclick = () => {
  const end = state.cursor === null || state.cursor >= Math.max(...runs().map((run) => run.last));
  if (state.playing) { state.playing = null; later(); } else play(end ? 0 : state.cursor);
};
$("speed").onchange = () => state.playing && play(state.cursor);
$("scrub").oninput = () => {
  const value = Number($("scrub").value);
  Object.assign(state, { playing: null, cursor: value >= Number($("scrub").max) ? null : value });
  later();
};
for (const choice of document.querySelectorAll("[name=unit]")) choice.onchange = () => {
  const { run } = state, was = state.cursor;
  state.unit = choice.value;
  if (was !== null && state.unit === "time") state.cursor = run.whole.timeAt(was);
  else if (was !== null) state.cursor = run.events.findLast((event) => event.time <= was)?.step ?? 0;
  if (state.playing) play(state.cursor);
  later();
};
for (const choice of document.querySelectorAll("[name=which]")) choice.onchange = () => {
  state.which = choice.value;
  slots.clear();
  $("answer").replaceChildren();
  later();
};
for (const kind of ["pointerover", "focusin"]) document.querySelector("main").addEventListener(kind, (event) => {
  light(event.target.closest?.("[data-name]")?.dataset.name ?? null);
});
for (const kind of ["pointerleave", "focusout"]) document.querySelector("main").addEventListener(kind, () => light(null));
$("rows").onclick = (event) => {
  const name = event.target.closest("[data-name]")?.dataset.name, slot = slots.get(name);
  slot?.scrollIntoView({ block: "nearest" });
  slot?.focus({ preventScroll: true });
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("cancel").hidden) $("cancel").click();
  if (event.key !== " " || !state.run || event.target.closest("button, input, select, textarea")) return;
  event.preventDefault();
  $("play").click();
});
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) load(event.dataTransfer.files[0]);
});

$("ask").hidden = LOCAL;
light(null);
if (!LOCAL) model().catch((error) => complain(error.message));
