// Folds the events of one response as pastalm/core/transcript.py does (tests/server/test_page.py holds that text and figures
// are the same), and keeps beside that when things happened, for the timeline and for Perfetto. No DOM.
"use strict";

const CHUNK_TAGS = 2; // what a chunk takes beside the tokens it was promised
const KINDS = ["forked", "decoded", "blocked", "joined", "finished"];
const DEFAULTS = { forced: [], children: [], text: "", topic: "", drafted: [], promised: 0, on: "sync", step: 0, time: 0 };
const tally = (counts, name) => { counts[name] = (counts[name] ?? 0) + 1; };
const nameOf = (path) => path.join(".") || "main";
const characters = (text) => [...text]; // as Python counts them, not in halves of an emoji

class Transcript {
  constructor(events = []) {
    this.threads = new Map(); // by name, in the order in which they began
    this.tokens = this.steps = this.passes = this.lastPass = this.criticalPath = this.seconds = 0;
    [this.firstToken, this.cut, this.times, this.joins] = [null, null, [], []]; // joins: { name, step, children }
    [this.drafted, this.accepted] = [{}, {}]; // by drafter: guesses that were fed, and those that came true
    for (const event of events) this.apply(event);
  }

  // Takes one event into account; throws on what is none, or is of a thread that never began.
  apply(given) {
    const event = { ...DEFAULTS, ...given }, { kind, step } = event;
    if (!KINDS.includes(kind)) throw new Error("no kind of event");
    if (kind === "forked") this.begin(event);
    const thread = this.threads.get(nameOf(event.path));
    this.steps = Math.max(this.steps, step);
    this.times[step] = this.seconds = Math.max(this.seconds, event.time);
    if (kind === "decoded") {
      this.firstToken ??= event.time;
      thread.slices.push({ ...event, tokens: 1 + event.forced.length });
      if (event.drafter) tally(this.accepted, event.drafter); else this.passes += this.lastPass !== (this.lastPass = step);
      for (const drafter of event.drafted) tally(this.drafted, drafter);
    } else if (kind === "blocked") {
      thread.state = event.on === "thread" ? "queued" : "waiting";
      thread.waits.push({ from: step, to: null, on: event.on });
    } else if (kind !== "forked" && thread.waits.at(-1)?.to === null) thread.waits.at(-1).to = step;
    if (kind === "joined") thread.state = "live";
    if (event.children.length) this.join(thread, event);
    const tokens = event.forced.length + (kind === "decoded");
    thread.tokens.push(...Array(tokens).fill(step));
    this.tokens += tokens;
    this.criticalPath = Math.max(this.criticalPath, thread.depth += tokens);
    if (event.text) thread.parts.push((typeof thread.parts.at(-1) === "string" ? thread.parts.pop() : "") + event.text);
    if (kind !== "finished") return;
    this.cut = event.cut ?? this.cut;
    Object.assign(thread, { state: "done", reason: event.reason, endStep: step });
  }

  begin({ path, topic, promised, step }) {
    const thread = {
      name: nameOf(path), parent: path.length ? nameOf(path.slice(0, -1)) : null, topic, promised,
      startStep: step, endStep: null, state: "live", reason: null, depth: 0, slices: [], waits: [],
      parts: [], tokens: [], // its own text, and { child } where a chunk stands; the step of each token
      after: new Map(), // by token: the token of another thread that it had to wait for
    };
    if (path.length) {
      const parent = this.threads.get(thread.parent);
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
    this.joins.push({ name: thread.name, step, children: joined.map((child) => child.name) });
  }

  get text() {
    const of = (name) => this.threads.get(name).parts.map((part) => part.child ? of(part.child) : part).join("");
    return this.threads.size ? characters(of("main")).slice(0, this.cut ?? Infinity).join("") : "";
  }

  get parallelism() { return this.criticalPath ? this.tokens / this.criticalPath : 1; }
  get tokensPerPass() { return this.passes ? this.tokens / this.passes : 1; }

  get finishReason() { // null while any thread goes on
    const reasons = [...this.threads.values()].map((thread) => thread.reason);
    const [worst] = [null, "abort", "length", "stop"].filter((reason) => reasons.includes(reason));
    return worst && this.cut !== null ? "stop" : worst ?? null;
  }

  // The longest chain of tokens of which each had to wait for the one before: [{ name, from, to, tokens }], in steps.
  criticalSpans() {
    const spans = [];
    let thread = [...this.threads.values()].find((t) => t.depth === this.criticalPath), to = thread?.tokens.length - 1;
    while (to >= 0) {
      let first = to; while (first > 0 && !thread.after.has(first)) first -= 1;
      spans.unshift({ name: thread.name, from: thread.tokens[first], to: thread.tokens[to], tokens: to - first + 1 });
      [thread, to] = thread.after.get(first) ?? [null, -1];
    }
    return spans;
  }

  // Seconds at which a step was over; for one yet to come, as steps have gone so far.
  timeAt(step) {
    let at = Math.max(0, Math.min(step, this.steps));
    while (at > 0 && this.times[at] === undefined) at -= 1;
    const pace = this.steps > 1 ? (this.seconds - (this.times[1] ?? 0)) / (this.steps - 1) : 0;
    return (this.times[at] ?? 0) + Math.max(0, step - this.steps) * pace;
  }

  // The step at which a thread would end if it kept its promise to the token.
  due(thread) { return thread.startStep + (thread.parent ? thread.promised + CHUNK_TAGS : 0); }
}

// Chrome's trace event format, which Perfetto opens: a slice for each step of a thread and each wait, arrows for forks
// and joins. Times are in microseconds. A token that a guess saved its pass has the category `guess` too.
function perfetto(transcript, title) {
  const threads = [...transcript.threads.values()], id = new Map(threads.map((t, i) => [t.name, i + 1]));
  const us = (time) => Math.round(time * 1e6), at = (step) => us(transcript.timeAt(step)), traceEvents = [];
  const add = (ph, name, tid, more) => traceEvents.push({ ph, name, pid: 1, tid, ...more });
  const slice = (tid, name, cat, ts, end, args) => add("X", name, tid, { cat, ts, dur: Math.max(1, end - ts), args });
  const arrow = (name, ...ends) => ends.forEach(([who, ts], i) =>
    add("sf"[i], name, id.get(who), { cat: "thread", id: traceEvents.length - i, ts: ts - 1 + i, bp: "e" }));
  add("M", "process_name", 0, { args: { name: title } });
  for (const { name, topic, parent, startStep, slices, waits } of threads) {
    const tid = id.get(name);
    add("M", "thread_name", tid, { args: { name: topic ? `${name} ${topic}` : name } });
    for (const { step, time, text, tag, tokens, drafter, drafted } of slices)
      slice(tid, tag ? "tag" : text || "…", drafter ? "decode,guess" : "decode", at(step - 1), us(time),
        { step, tokens, ...(drafter && { drafter }), ...(drafted.length && { drafted: drafted.join(", ") }) });
    for (const { from, to, on } of waits) slice(tid, `waits (${on})`, "wait", at(from), at(to ?? transcript.steps), {});
    if (parent) arrow("fork", [parent, at(startStep)], [name, at(startStep)]);
  }
  for (const { name, step, children } of transcript.joins)
    for (const child of children) arrow("join", [child, at(transcript.threads.get(child).endStep)], [name, at(step)]);
  return { traceEvents, displayTimeUnit: "ms" };
}
