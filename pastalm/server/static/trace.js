// Folds the events of one response as pastalm/transcript.py does; tests/server/test_page.py holds that both give the
// same text and figures. Beside that it keeps when things happened, for the timeline and for Perfetto. No DOM.
"use strict";

const CHUNK_TAGS = 2; // what a chunk takes beside the tokens it was promised
const KINDS = ["forked", "decoded", "blocked", "joined", "finished"];
const DEFAULTS = { forced: [], children: [], text: "", topic: "", promised: 0, on: "sync", step: 0, time: 0 };
const nameOf = (path) => path.join(".") || "main";
const characters = (text) => [...text]; // as Python counts them, not in halves of an emoji

class Transcript {
  constructor(events = []) {
    this.threads = new Map(); // by name, in the order in which they began
    this.tokens = this.steps = this.criticalPath = this.seconds = 0;
    this.firstToken = this.cut = null;
    this.times = []; // by step: when it was over
    this.joins = []; // { name, step, children }
    for (const event of events) this.apply(event);
  }

  // Takes one event into account; throws on what is none, or of a thread that never began.
  apply(given) {
    const event = { ...DEFAULTS, ...given };
    if (!KINDS.includes(event.kind) || !Array.isArray(event.path)) throw new Error("not an event");
    if (event.kind === "forked") this.begin(event);
    const thread = this.threads.get(nameOf(event.path));
    if (!thread) throw new Error("an event of a thread that never began");
    this.steps = Math.max(this.steps, event.step);
    this.seconds = Math.max(this.seconds, event.time);
    this.times[event.step] = this.seconds;
    if (event.kind === "decoded") {
      this.firstToken ??= event.time;
      const { step, time, text, tag } = event;
      thread.slices.push({ step, time, text, tag, tokens: 1 + event.forced.length });
      this.count(thread, step);
      thread.write(text);
    } else if (event.kind === "blocked") {
      thread.state = event.on === "thread" ? "queued" : "waiting";
      thread.waits.push({ from: event.step, to: null, on: event.on });
    } else if (event.kind === "joined") {
      thread.state = "live";
      this.endWait(thread, event.step);
      if (event.children.length) this.join(thread, event);
    }
    for (const _ of event.forced) this.count(thread, event.step);
    if (event.kind === "finished") {
      thread.write(event.text);
      this.cut = event.cut ?? this.cut;
      this.endWait(thread, event.step);
      Object.assign(thread, { state: "done", reason: event.reason, endStep: event.step });
    }
  }

  begin({ path, topic, promised, step }) {
    const thread = {
      name: nameOf(path), parent: path.length ? nameOf(path.slice(0, -1)) : null, topic, promised,
      startStep: step, endStep: null, state: "live", reason: null, depth: 0,
      parts: [], // its own text, and { child } where a chunk stands
      tokens: [], // the step of each
      after: new Map(), // by token: the token of another thread that it had to wait for
      slices: [], waits: [],
      write(text) {
        if (typeof this.parts.at(-1) === "string") this.parts.push(this.parts.pop() + text);
        else if (text) this.parts.push(text);
      },
    };
    if (path.length) {
      const parent = this.threads.get(thread.parent);
      if (!parent) throw new Error("a chunk of a thread that never began");
      thread.depth = parent.depth;
      thread.after.set(0, [parent, parent.tokens.length - 1]);
      parent.parts.push({ child: thread.name });
    }
    this.threads.set(thread.name, thread);
  }

  join(thread, { step, children }) {
    const joined = children.map((path) => this.threads.get(nameOf(path)));
    const last = joined.reduce((a, b) => (b.depth > a.depth ? b : a));
    if (last.depth > thread.depth) {
      thread.depth = last.depth;
      thread.after.set(thread.tokens.length, [last, last.tokens.length - 1]);
    }
    thread.parts.push({ sync: true });
    this.joins.push({ name: thread.name, step, children: joined.map((child) => child.name) });
  }

  count(thread, step) {
    thread.tokens.push(step);
    this.tokens += 1;
    this.criticalPath = Math.max(this.criticalPath, ++thread.depth);
  }

  endWait(thread, step) {
    const wait = thread.waits.at(-1);
    if (wait && wait.to === null) wait.to = step;
  }

  *pieces(name = "main") {
    for (const part of this.threads.get(name)?.parts ?? []) {
      if (typeof part === "string") yield part;
      else if (part.child) yield* this.pieces(part.child);
    }
  }

  get text() {
    const text = [...this.pieces()].join("");
    return this.cut === null ? text : characters(text).slice(0, this.cut).join("");
  }

  get parallelism() { return this.criticalPath ? this.tokens / this.criticalPath : 1; }

  get finished() { return this.threads.size > 0 && [...this.threads.values()].every((t) => t.state === "done"); }

  get finishReason() {
    if (!this.finished) return null;
    const reasons = [...this.threads.values()].map((t) => t.reason);
    return this.cut !== null ? "stop" : ["abort", "length"].find((r) => reasons.includes(r)) ?? "stop";
  }

  // The longest chain of tokens of which each had to wait for the one before: [{ name, from, to, tokens }], in steps.
  criticalSpans() {
    let thread = [...this.threads.values()].find((t) => t.depth === this.criticalPath && t.tokens.length);
    const spans = [];
    for (let to = thread?.tokens.length - 1; thread && to >= 0; ) {
      let first = to;
      while (first > 0 && !thread.after.has(first)) first -= 1;
      const { name, tokens } = thread;
      spans.unshift({ name, from: tokens[first], to: tokens[to], tokens: to - first + 1 });
      [thread, to] = thread.after.get(first) ?? [null, 0];
    }
    return spans;
  }

  // Seconds at which a step was over; for one yet to come, as steps have gone so far.
  timeAt(step) {
    const known = Math.max(0, Math.min(Math.floor(step), this.steps));
    let at = known;
    while (at > 0 && this.times[at] === undefined) at -= 1;
    const pace = this.steps > 1 ? (this.seconds - (this.times[1] ?? 0)) / (this.steps - 1) : 0;
    return (this.times[at] ?? 0) + Math.max(0, step - this.steps) * pace;
  }

  due(thread) { return thread.startStep + (thread.parent ? thread.promised + CHUNK_TAGS : 0); }
}

// The events of a trace file (JSON lines); throws an Error that names the line.
function parseTrace(text) {
  const events = [], transcript = new Transcript();
  text.split("\n").forEach((line, i) => {
    if (!line.trim()) return;
    try {
      const event = JSON.parse(line);
      transcript.apply(event);
      events.push(event);
    } catch (error) {
      throw new Error(`line ${i + 1}: ${error instanceof SyntaxError ? "not JSON" : error.message}`);
    }
  });
  if (!events.length) throw new Error("it holds no events");
  return events;
}

// Chrome's trace event format, which Perfetto opens: a slice for each step of a thread and each wait, arrows for forks
// and joins. Times are in microseconds.
function perfetto(transcript, title) {
  const threads = [...transcript.threads.values()], id = new Map(threads.map((t, i) => [t.name, i + 1]));
  const us = (seconds) => Math.round(seconds * 1e6), at = (step) => us(transcript.timeAt(step));
  const events = [{ ph: "M", name: "process_name", pid: 1, args: { name: title } }];
  const slice = (tid, name, cat, ts, end, args) =>
    events.push({ ph: "X", name, cat, pid: 1, tid, ts, dur: Math.max(1, end - ts), args });
  let arrows = 0;
  const arrow = (name, from, fromAt, to, toAt) => {
    const common = { name, cat: "thread", pid: 1, id: ++arrows };
    events.push({ ...common, ph: "s", tid: id.get(from), ts: Math.max(0, fromAt - 1) });
    events.push({ ...common, ph: "f", bp: "e", tid: id.get(to), ts: toAt });
  };
  for (const thread of threads) {
    const tid = id.get(thread.name);
    const args = { name: [thread.name, thread.topic].filter(Boolean).join(" ") };
    events.push({ ph: "M", name: "thread_name", pid: 1, tid, args });
    events.push({ ph: "M", name: "thread_sort_index", pid: 1, tid, args: { sort_index: tid } });
    for (const { step, time, text, tag, tokens } of thread.slices)
      slice(tid, tag ? "tag" : text || "…", "decode", at(step - 1), us(time), { step, tokens });
    for (const { from, to, on } of thread.waits)
      slice(tid, `waits for ${on === "thread" ? "a place" : "its chunks"}`, "wait", at(from), at(to ?? transcript.steps), {});
    if (thread.parent) arrow("fork", thread.parent, at(thread.startStep), thread.name, at(thread.startStep));
  }
  for (const { name, step, children } of transcript.joins)
    for (const child of children) arrow("join", child, at(transcript.threads.get(child).endStep), name, at(step));
  return { traceEvents: events, displayTimeUnit: "ms" };
}
