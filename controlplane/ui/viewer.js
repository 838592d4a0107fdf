// A viewer of a PTY that stays one while its connections come and go.
//
// Theory of operation. What the terminal got is counted in offsets of the log, what was typed in offsets of this viewer. Each line goes
// on from both, so that nothing is shown twice and nothing is typed twice or lost.
//
// Rule 1: typed bytes are kept until the runner has taken them, and said from the first that is not taken on each new line.
// Rule 2: nothing is typed before the replay is through. Rule 3: a line on which a word is due and none comes is given up.

import { Line, newKey, publicText } from "./adapter.js";

const PIECE_BYTES = 16 * 1024; // typed in one message, at most
const HELD_BYTES_MAX = 1024 * 1024; // typed and not taken: a large paste
const SILENCE_MS = 10_000; // the word that is due takes one round trip; browsers notice a dead line after many minutes
const DELAY_MS = { first: 250, most: 10_000 };
const PASSING = new Set(["BUSY", "BAD_TICKET", "INTERNAL", "RUNNER_SILENT", "STORE_FAILED"]); // may be none the next time
const FATAL = new Set(["BAD_SIG", "UNKNOWN_VIEWER"]); // nothing that is typed will ever be taken

// Whether it is worth asking again after a refusal for this reason.
export const passes = (reason) => PASSING.has(reason);

export class Viewer {
  #its; #mode; #key = null; #attempt = null;
  #line = null; #from = null; #drop = () => {}; #wake = () => {}; #silence = null;
  #live = false; #fresh = true; #offline = false; #hurried = false; #over = false; #writes = false;
  #base = 0; #held = new Uint8Array(); #sent = 0; #credit = 0; #rewound = ""; // typed: taken below `base`, and `held` from there on
  #gen = 0;

  // `admit({key, mode})` gives the answer of `POST /v1/ptys/{id}/attach`; an error of it with `final` set ends it all. `url(ticket)` is
  // where the WebSocket is, `room()` the {rows, cols} that there is room for. `tell(news)` gets the text frames of the server, and of
  // the line `connecting`, `lost` {delay}, `failed` {detail, final} and `untaken` {reason}: what it types never will be.
  constructor({ terminal, mode, admit, url, room, tell }) {
    this.#its = { terminal, admit, url, room, tell };
    this.#mode = mode;
  }

  // Be at the PTY until it ends, or nothing more can come of it.
  async run() {
    for (let tries = 0; !this.#over; tries += 1) {
      this.#its.tell({ t: "connecting" });
      try {
        this.#key ??= await newKey();
        const admitted = await this.#its.admit({ key: await publicText(this.#key), mode: this.#mode });
        if (!this.#hurried && (await this.#converse(admitted))) tries = 0;
      } catch (error) {
        this.#over ||= Boolean(error.final);
        this.#its.tell({ t: "failed", detail: error.message, final: this.#over });
      }
      if (!this.#over && !this.#hurried) {
        const delay = Math.min(DELAY_MS.most, DELAY_MS.first * 2 ** Math.min(tries, 10)) * (0.5 + Math.random() / 2);
        this.#its.tell({ t: "lost", delay });
        await new Promise((wake) => setTimeout((this.#wake = wake), delay));
      }
      this.#hurried = false;
    }
  }

  // Type bytes. False: too much waits already, and nothing of these is typed.
  type(bytes) {
    if (this.#over || this.#mode !== "rw" || this.#held.length + bytes.length > HELD_BYTES_MAX) return false;
    const held = new Uint8Array(this.#held.length + bytes.length);
    held.set(this.#held);
    held.set(bytes, this.#held.length);
    this.#held = held;
    this.#offer();
    return true;
  }

  // There is another room for the terminal. `redraw`: the program is made to draw anew.
  resize(redraw = false) {
    if (!this.#live || !this.#writes) return;
    const { rows, cols } = this.#its.room();
    this.#gen = Math.max(this.#gen + 1, Date.now());
    this.#line.resize(this.#gen, rows, cols, redraw);
  }

  // Go on as `rw` or `ro`, which is another viewer. What was typed and is not taken is given up together with the key: under the same
  // one nobody could say which of it the runner has.
  switchTo(mode) {
    this.#mode = mode;
    if (this.#held.length) this.#key = null;
    this.#take(this.#base + this.#held.length);
    if (this.#key === null) this.#base = 0;
    this.hurry();
  }

  // Make the line anew, at once.
  hurry() {
    this.#hurried = true;
    this.#drop();
    this.#wake();
  }

  // From one ticket to the end of its line; whether it ever was live.
  #converse({ ticket, attempt, viewer }) {
    const { terminal, url, room } = this.#its;
    if (attempt !== this.#attempt) [this.#attempt, this.#from, this.#held, this.#base] = [attempt, null, new Uint8Array(), 0];
    return new Promise((ended) => {
      let lived = false;
      const gone = () => {
        if (line !== this.#line) return;
        [this.#from, this.#line, this.#live, this.#offline] = [line.from, null, false, false];
        clearTimeout(this.#silence);
        this.#silence = null;
        line.close();
        ended(lived);
      };
      const hear = (said) => {
        if (line !== this.#line) return;
        lived ||= said.t === "live";
        this.#hear(said);
      };
      const begin = { attach: "replay", from: this.#from, ...room() };
      const line = new Line({ url: url(ticket), attempt, viewer, key: this.#key, terminal, begin, hear, gone });
      [this.#line, this.#drop] = [line, gone];
      this.#expect();
    });
  }

  #hear(said) {
    clearTimeout(this.#silence);
    this.#silence = null;
    if (said.t === "begun") this.#begun(said);
    if (said.t === "skipped") [this.#live, this.#fresh] = [false, true];
    if (said.t === "live") this.#goLive();
    if (said.t === "taken") this.#taken(said);
    if (said.t === "offline" || said.t === "online") this.#offline = said.t === "offline";
    if (said.t === "ended" || (said.t === "refused" && !passes(said.reason))) this.#over = true;
    this.#its.tell(said);
    if (said.t === "taken" && FATAL.has(said.reason)) {
      this.#over = true;
      this.#its.tell({ t: "untaken", reason: said.reason });
      this.#drop();
    }
  }

  #begun({ mode, offset, received }) {
    this.#fresh ||= offset !== this.#from;
    this.#writes = mode === "rw";
    if (this.#writes) this.#take(received);
    [this.#sent, this.#credit, this.#rewound] = [this.#base, this.#base + PIECE_BYTES, ""];
  }

  #goLive() {
    // Who draws a whole screen is asked to: what was replayed may begin in the middle of it.
    const redraw = this.#fresh && this.#its.terminal.buffer?.active.type === "alternate";
    [this.#live, this.#fresh] = [true, false];
    this.resize(redraw);
    this.#offer();
  }

  #taken({ received, credit, closed }) {
    const before = this.#base;
    this.#take(closed ? before + this.#held.length : received);
    const place = `${this.#base} ${credit}`;
    if (this.#base === before && this.#rewound !== place) {
      // It answers a piece that was not taken: there was no room, or something before it was lost. It is said anew, once.
      [this.#sent, this.#rewound] = [this.#base, place];
    }
    [this.#sent, this.#credit] = [Math.max(this.#sent, this.#base), Math.max(credit, this.#base)];
    this.#offer();
  }

  // All below `received` is taken. Who says less than was heard before has forgotten.
  #take(received) {
    const count = Math.max(0, received - this.#base);
    this.#held = this.#held.slice(count);
    this.#base += count;
  }

  // Say what was typed, as far as there is room for it.
  #offer() {
    if (!this.#live || !this.#writes) return;
    for (let until; this.#sent < (until = Math.min(this.#credit, this.#base + this.#held.length)); this.#expect()) {
      const at = this.#sent - this.#base;
      this.#sent = this.#line.type(this.#sent, this.#held.slice(at, at + Math.min(PIECE_BYTES, until - this.#sent)));
    }
  }

  // A word is due.
  #expect() {
    if (!this.#offline) this.#silence ??= setTimeout(this.#drop, SILENCE_MS);
  }
}
