// One connection to a PTY (docs/terminals.md §7), for any terminal with `write(data, then)`, `resize(cols, rows)` as xterm.js has them.
//
//   const key = await newKey();
//   const { ticket, attempt, viewer } = await attach({ key: await publicText(key), mode: "rw" }); // POST /v1/ptys/{id}/attach
//   const url = `ws://127.0.0.1:8080/v1/ptys/${id}?ticket=${ticket}`;
//   let typed = 0;
//   const line = new Line({ url, attempt, viewer, key, terminal, begin: { attach: "replay", rows: 24, cols: 80 }, hear(said) {
//     if (said.t === "begun") typed = said.received;
//   } });
//   terminal.onData((text) => { typed = line.type(typed, new TextEncoder().encode(text)); });
//
// Rule: what touches the terminal goes through its queue of writes, hence in the order in which it came.

const SUBPROTOCOL = "local-runner.pty.v1";
const SEEN_BYTES = 48 * 1024; // shown between two words about it: the PTY waits for them
const RESET = "\x1bc";

const utf8 = new TextEncoder();
const base64 = (bytes) => btoa(String.fromCharCode(...bytes));
const base64url = (buffer) => base64(new Uint8Array(buffer)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");

// A key of a viewer; the private half cannot be read by anybody. Throws where the browser has no Ed25519.
export const newKey = () => crypto.subtle.generateKey("Ed25519", false, ["sign", "verify"]);

// What `attach` wants to know of it.
export const publicText = async (key) => base64url(await crypto.subtle.exportKey("raw", key.publicKey));

export class Line {
  #its; #socket; #tail = Promise.resolve(); #told = 0; #queued = 0;
  #got; // the log offset to go on from; null: within a replay there is none

  // `hear(said)` gets each text frame of the server, `live` once the terminal shows what came before it; `gone()`: it is closed.
  constructor({ url, attempt, viewer, key, terminal, begin, hear, gone = () => {} }) {
    this.#its = { attempt, viewer, key, terminal, hear };
    this.#got = begin.from ?? null;
    this.#socket = new WebSocket(url, SUBPROTOCOL);
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onopen = () => this.#say({ t: "begin", from: null, ...begin });
    this.#socket.onmessage = ({ data }) => (typeof data === "string" ? this.#hear(JSON.parse(data)) : this.#show(data));
    this.#socket.onclose = gone;
  }

  // Where a later connection goes on (`begin.from`).
  get from() {
    return this.#got;
  }

  // Type bytes, 16 KiB at most, that begin at this offset of all that the viewer typed; gives the offset behind them.
  type(offset, bytes) {
    this.#sign("typed", [8, offset], bytes, (sig) => ({ t: "typed", offset, data: base64(bytes), sig }));
    return offset + bytes.length;
  }

  // There is room for so much; a later `gen` counts. `redraw`: the program is made to draw anew.
  resize(gen, rows, cols, redraw = false) {
    const said = (sig) => ({ t: "resized", gen, rows, cols, redraw, sig });
    this.#sign("resized", [8, gen], [2, rows], [2, cols], [1, Number(redraw)], said);
  }

  close() {
    this.#socket.onmessage = null;
    this.#socket.close();
  }

  #show(frame) {
    const offset = Number(new DataView(frame).getBigUint64(0, true));
    if (this.#got !== null) this.#got = offset;
    this.#queued += 1;
    this.#its.terminal.write(new Uint8Array(frame, 8), () => {
      this.#queued -= 1;
      if (this.#queued && offset - this.#told < SEEN_BYTES) return;
      this.#told = offset;
      this.#say({ t: "seen", offset });
    });
  }

  #hear(said) {
    const { terminal, hear } = this.#its;
    const inOrder = (act) => terminal.write("", act);
    if (said.t === "skipped" || (said.t === "begun" && said.offset !== this.#got)) {
      this.#got = null;
      terminal.write(RESET);
    }
    if (said.t === "begun") this.#told = said.offset;
    if (said.t === "begun" || said.t === "size") inOrder(() => terminal.resize(said.cols, said.rows));
    if (said.t === "live") this.#got = said.offset;
    if (said.t === "live") inOrder(() => hear(said));
    else hear(said);
  }

  // Say what is made of a signature over the parts, behind all that was said before: signatures need not be ready in order.
  #sign(what, ...parts) {
    const made = parts.pop();
    const { attempt, viewer, key } = this.#its;
    const signed = [utf8.encode(`local-runner.${what}.v1\0${attempt}\0${viewer}\0`), ...parts.map(little)];
    const bytes = Uint8Array.from(signed.flatMap((part) => [...part]));
    const sig = crypto.subtle.sign("Ed25519", key.privateKey, bytes);
    this.#tail = this.#tail.then(async () => this.#say(made(base64url(await sig))));
  }

  #say(message) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }
}

// [size, value] as that many bytes, little endian; bytes as they are.
function little(part) {
  if (part instanceof Uint8Array) return part;
  const bytes = new DataView(new ArrayBuffer(8));
  bytes.setBigUint64(0, BigInt(part[1]), true);
  return new Uint8Array(bytes.buffer, 0, part[0]);
}
