// The page: asks the server or reads a trace, keeps what came in `state`, lets people move through it.
"use strict";

const state = {
  run: null, race: null, which: "run", // the answer, the sequential one beside it, and whose text is shown
  cursor: null, playing: null, // shown up to so many seconds (null: all there is); since when it moves on
  unit: "step", hot: null, frame: 0, model: null, abort: null, wanted: null, // the run that was asked for last
};
const runs = () => [state.run, state.race].filter(Boolean);
const longest = () => Math.max(...runs().map((run) => run.whole.seconds));

// One answer: its events, folded as they come, and folded up to the cursor. how: running, done or stopped.
class Run {
  constructor(how) { Object.assign(this, { how, events: [], whole: new Transcript(), begun: performance.now() }); }
  take(event) { this.whole.apply(event); this.events.push(event); }
  end(how) { Object.assign(this, { how, wall: (performance.now() - this.begun) / 1000 }); }
  at(step) { return state.unit === "step" ? step : this.whole.timeAt(step); } // its place on the axis
  open(thread) { return thread.state !== "done" && (this.how === "running" || state.cursor !== null); }

  get shown() {
    if (state.cursor === null) return this.whole;
    const beyond = this.events.findIndex((event) => event.time > state.cursor);
    const count = beyond < 0 ? this.events.length : beyond;
    if (this.kept?.count !== count) this.kept = { count, part: new Transcript(this.events.slice(0, count)) };
    return this.kept.part;
  }

  describe(thread) {
    const { steps } = this.shown, at = (step) => this.shown.timeAt(step).toFixed(2), end = thread.endStep ?? steps;
    const waited = thread.waits.reduce((sum, { from, to }) => sum + (to ?? steps) - from, 0);
    const who = this === state.race ? "sequential" : [thread.name, thread.topic].filter(Boolean).join(", ");
    const ended = { stop: "done", length: "cut", abort: "stopped" }[thread.reason];
    return [
      `${who}: ${thread.tokens.length} tokens${thread.promised ? ` of ${thread.promised} promised` : ""}`,
      `steps ${thread.startStep} to ${end}`, `${at(thread.startStep)} to ${at(end)} s`,
      waited && `waited ${waited} steps`, ended ?? (this.open(thread) ? thread.state : "stopped"),
    ].filter(Boolean).join(", ");
  }
}

function draw() {
  state.frame = 0;
  if (!state.run) return;
  const most = longest(), { playing } = state;
  if (playing) state.cursor = playing.from + ((performance.now() - playing.begun) / 1000) * Number($("speed").value);
  if (playing && state.cursor >= most) state.cursor = state.playing = null;
  drawTimeline(state);
  drawAnswer(state[state.which]);
  drawNumbers(state);
  const steps = (which) => Math.max(...runs().map((run) => run[which].steps)), value = state.cursor ?? most;
  $("place").textContent = state.unit === "step" ? `step ${steps("shown")}` : seconds(value);
  const ariaValueText = `step ${steps("shown")} of ${steps("whole")}, ${seconds(value)}`;
  Object.assign($("scrub"), { max: most, step: (most / (steps("whole") || 1)) * (1 - 1e-9), value, ariaValueText });
  $("play").textContent = state.playing ? "❚❚" : "▶";
  $("play").ariaLabel = state.playing ? "Pause" : "Play";
  light(state.hot);
  if (state.playing) later();
}

const later = () => { state.frame ||= requestAnimationFrame(draw); };
const play = (from) => later(Object.assign(state, { cursor: from, playing: { from, begun: performance.now() } }));

// Marks a thread in the timeline and its chunk in the answer.
function light(name) {
  state.hot = name;
  document.body.classList.toggle("pointing", name !== null);
  for (const each of document.querySelectorAll("[data-name]")) each.classList.toggle("hot", each.dataset.name === name);
  const [run, thread] = name === "sequential" ? [state.race, "main"] : [state.run, name];
  const known = run?.shown.threads.get(thread);
  $("detail").textContent = known ? run.describe(known) : "";
}

// From now on this is drawn.
function show(run, title) {
  Object.assign(state, { run, race: null, cursor: null, playing: null, which: "run", hot: null });
  document.querySelector("[value=run]").checked = true;
  for (const map of [rows, slots]) map.clear();
  for (const id of ["rows", "answer"]) $(id).replaceChildren();
  for (const id of ["panes", "save", "perfetto", "empty"]) $(id).hidden = id === "empty";
  $("model").textContent = title;
  later();
}

const complain = (said = "") => Object.assign($("error"), { textContent: said.replace(/\s+/g, " "), hidden: !said });

async function asked(path, options) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const reply = await fetch(path, { headers, ...options }).catch(() => {
    throw new Error("the server cannot be reached: is it still running?");
  });
  if (reply.ok) return reply;
  if (reply.status === 401) $("keyed").hidden = false;
  throw new Error((await reply.json().catch(() => null))?.error?.message ?? `the server answered ${reply.status}`);
}

const model = async (options) => state.model ??= (await (await asked("v1/models", options)).json()).data[0].id;
const greet = () => model().then( // or its error; either may come when something else is shown already
  (name) => state.run || ($("model").textContent = name), ({ message }) => state.model || complain(message));

// Decodes the prompt, and feeds the events to a run as they come. Throws what went wrong, or that it was cancelled.
async function stream(run, signal, odds) {
  const messages = [{ role: "user", content: $("prompt").value }], pasta = { events: true, parallelism: odds };
  const body = { model: await model(), messages, stream: true, pasta };
  for (const { name, value } of document.querySelectorAll("#ask [name]")) if (value) body[name] = Number(value);
  const reply = await asked("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", over = false;
  for (let part; !(part = await reader.read()).done; later()) {
    const lines = (held + part.value).split("\n");
    held = lines.pop();
    over ||= lines.includes("data: [DONE]");
    for (const line of lines.filter((each) => each.startsWith("data: {"))) {
      const { error, pasta: told } = JSON.parse(line.slice(6));
      if (error) throw new Error(error.message);
      for (const event of told?.events ?? []) run.take(event);
    }
  }
  if (!over) throw new Error("the stream broke off before its end");
  run.end("done");
}

async function decode() {
  const { signal } = state.abort = new AbortController(), racing = $("race").checked;
  let run = state.wanted = new Run("running");
  complain();
  document.body.classList.add("busy");
  $("status").textContent = "decoding …";
  try {
    show(run, await model({ signal }));
    await stream(run, signal, $("odds").value ? Number($("odds").value) : null);
    if (!racing || signal.aborted) return;
    $("status").textContent = "decoding it once more, sequentially …";
    state.race = run = new Run("running");
    await stream(run, signal, 0);
  } catch (error) {
    run.end("stopped");
    if (!signal.aborted) complain(error.message);
  } finally {
    document.body.classList.remove("busy");
    $("status").textContent = signal.aborted ? "cancelled" : run.how;
    later();
  }
}

function save(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  Object.assign(make("a", ""), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// Opens a trace file: an event of one answer on each line.
async function load(file) {
  const run = state.wanted = new Run("done");
  let number = 0;
  try {
    const text = await file.text();
    if (state.wanted !== run) return;
    for (const line of text.split("\n")) if (++number && line.trim()) run.take(JSON.parse(line));
  } catch {
    return complain(`${file.name}, line ${number}: not an event of this answer`);
  }
  if (!run.events.length) return complain(`${file.name} holds no events`);
  state.abort?.abort();
  complain(show(run, file.name));
}

const on = (target, kinds, act) => kinds.split(" ").forEach((kind) => target.addEventListener(kind, act));
const named = (event) => event.target.closest("[data-name]")?.dataset.name ?? null;
const drawn = () => state[state.which];
on($("ask"), "submit", (event) => { event.preventDefault(); if (!document.body.matches(".busy")) decode(); });
on($("cancel"), "click", () => state.abort.abort());
on($("prompt"), "keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) $("ask").requestSubmit(event.preventDefault());
});
on($("key"), "change", () => greet(complain()));
on($("file"), "change", () => { if ($("file").files.length) load($("file").files[0]); $("file").value = ""; });
on($("save"), "click", () => save("trace.jsonl", drawn().events.map((event) => `${JSON.stringify(event)}\n`).join("")));
on($("perfetto"), "click", () =>
  save("trace.perfetto.json", JSON.stringify(perfetto(drawn().whole, $("model").textContent))));
on($("play"), "click", () => { if (state.playing) { state.playing = null; later(); } else play(state.cursor ?? 0); });
on($("speed"), "change", () => state.playing && play(state.cursor));
on($("scrub"), "input", ({ target: { value } }) =>
  later(Object.assign(state, { playing: null, cursor: longest() - value < 1e-6 ? null : Number(value) })));
on($("timeline"), "change", ({ target }) => { if (target.name === "unit") state.unit = target.value; later(); });
on($("which"), "change", ({ target }) => { state.which = target.value; slots.clear(); later(); });
on($("panes"), "pointerover focusin", (event) => light(named(event)));
on($("panes"), "pointerleave focusout", () => light(null));
on($("rows"), "click", (event) => slots.get(named(event))?.focus());
on(window, "keydown", ({ key }) => key === "Escape" && state.abort?.abort());
on(window, "dragover dragleave drop", (event) => {
  event.preventDefault();
  document.body.classList.toggle("dropping", event.type === "dragover");
  if (event.type === "drop" && event.dataTransfer.files.length) load(event.dataTransfer.files[0]);
});
if (location.protocol === "file:") $("ask").hidden = $("status").hidden = true; else greet();
