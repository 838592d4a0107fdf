// The pages /ui/ptys and /ui/ptys/{id}: who asks for the token, lists PTYs, and shows one with xterm.js.
//
// Rule 1: the token stands in no address that is sent; a fragment that brings it is gone from the address at once.
// Rule 2: words of others get onto the page as text, never as markup.

import { FitAddon } from "./addon-fit.mjs";
import { Terminal } from "./xterm.mjs";
import { newKey } from "./adapter.js";
import { Viewer, passes } from "./viewer.js";

const TOKEN = "local-runner.token";
const CELLS_MAX = 1000; // rows, and columns, of a PTY
const SCROLLBACK_LINES = 10_000;
const ANSWER_MS = 30_000; // a control plane waits 20 s for a runner to let somebody in
const utf8 = new TextEncoder();
const part = (id) => document.getElementById(id);

function say(text, mood = "") {
  part("status").textContent = text;
  part("status").className = mood;
}

// --- the control plane ------------------------------------------------------------------------------------------

const brought = new URLSearchParams(location.hash.slice(1)).get("token");
if (brought !== null) {
  sessionStorage.setItem(TOKEN, brought);
  history.replaceState(null, "", location.pathname);
}

// The token: of this tab, else what somebody says now.
function token() {
  const known = sessionStorage.getItem(TOKEN);
  if (known) return known;
  part("ask").hidden = false;
  part("token").focus();
  return new Promise((resolve) => {
    part("ask").onsubmit = (event) => {
      event.preventDefault();
      const said = part("token").value.trim();
      part("token").value = "";
      part("ask").hidden = true;
      sessionStorage.setItem(TOKEN, said);
      resolve(said);
    };
  });
}

// Ask under /v1. A refusal is an error that is `final` where the same would be refused again.
async function ask(path, body) {
  const sent = body && { method: "POST", body: JSON.stringify(body) };
  const headers = { Authorization: `Bearer ${await token()}` };
  const signal = AbortSignal.timeout(ANSWER_MS);
  const answer = await fetch(`/v1${path}`, { ...sent, headers, signal, cache: "no-store", redirect: "error" }).catch(() => {
    throw new Error("the control plane cannot be reached");
  });
  if (answer.ok) return answer.json();
  if (answer.status === 401) {
    sessionStorage.removeItem(TOKEN);
    say("this is not the token", "bad");
    return ask(path, body);
  }
  const { error } = await answer.json().catch(() => ({ error: { reason: "INTERNAL", detail: `status ${answer.status}` } }));
  throw Object.assign(new Error([error.reason, error.detail].filter(Boolean).join(": ")), { final: !passes(error.reason) });
}

// --- all PTYs ---------------------------------------------------------------------------------------------------

async function list() {
  const { ptys } = await ask("/ptys?all=true");
  const rows = ptys.map((pty) => {
    const link = Object.assign(document.createElement("a"), { href: `/ui/ptys/${pty.id}`, textContent: pty.id });
    const program = pty.argv.join(" ") || "login shell";
    const row = document.createElement("tr");
    for (const content of [link, pty.runner_name, program, pty.state, new Date(pty.created_ms).toLocaleString()]) {
      row.insertCell().append(content);
    }
    return row;
  });
  part("list").tBodies[0].replaceChildren(...rows);
  part("list").hidden = false;
  say(rows.length ? "" : "there is none");
}

// --- one PTY ----------------------------------------------------------------------------------------------------

async function show(id) {
  part("name").textContent = document.title = id;
  await checkKeys();
  await ask(`/ptys/${id}`);
  const terminal = new Terminal({ scrollback: SCROLLBACK_LINES, fontFamily: "monospace", fontSize: 14, disableStdin: true });
  const fit = new FitAddon();
  terminal.loadAddon(fit);
  part("terminal").hidden = part("mode").hidden = false;
  terminal.open(part("terminal"));
  const room = () => {
    const { rows, cols } = fit.proposeDimensions() ?? terminal;
    return { rows: Math.min(rows, CELLS_MAX), cols: Math.min(cols, CELLS_MAX) };
  };
  const viewer = new Viewer({
    terminal,
    room,
    mode: "rw",
    admit: (asked) => ask(`/ptys/${id}/attach`, asked),
    url: (ticket) => `${location.origin.replace(/^http/, "ws")}/v1/ptys/${id}?ticket=${encodeURIComponent(ticket)}`,
    tell: narrator(terminal),
  });
  const type = (bytes) => {
    if (!viewer.type(bytes)) say("too much was typed that is not taken yet: the last of it is dropped", "bad");
  };
  terminal.onData((text) => type(utf8.encode(text)));
  terminal.onBinary((text) => type(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));
  let had = "";
  new ResizeObserver(() => {
    const { rows, cols } = room();
    if (had !== (had = `${rows} ${cols}`)) viewer.resize();
  }).observe(part("terminal"));
  part("readonly").onchange = () => {
    terminal.options.disableStdin = true;
    viewer.switchTo(part("readonly").checked ? "ro" : "rw");
    terminal.focus();
  };
  window.addEventListener("online", () => viewer.hurry());
  terminal.focus();
  await viewer.run();
}

// Fails, in words for a person, where what is typed cannot be signed.
async function checkKeys() {
  if (!globalThis.isSecureContext) throw new Error("what is typed is signed, and browsers do that on HTTPS and localhost only");
  await newKey().catch(() => {
    throw new Error("what is typed is signed with Ed25519, and this browser cannot: a newer one can");
  });
}

// What becomes of the news of a viewer: words, and whether one may type.
function narrator(terminal) {
  let why = "";
  const connected = () => say(terminal.options.disableStdin ? "connected, read only" : "connected", "good");
  const told = {
    connecting: () => say("connecting …"),
    begun: ({ mode }) => (terminal.options.disableStdin = mode !== "rw"),
    live: connected,
    online: connected,
    offline: () => say("its machine cannot be reached; what is typed waits", "bad"),
    skipped: () => say("too far behind: catching up"),
    failed: ({ detail, final }) => say((why = detail), final ? "bad" : ""),
    refused: ({ reason, detail }) => say((why = `${reason}: ${detail}`), "bad"),
    untaken: ({ reason }) => say(`nothing that is typed here is taken: ${reason}`, "bad"),
    lost: ({ delay }) => {
      say(`${why || "the line is lost"}; again in ${(delay / 1000).toFixed(1)} s`, "bad");
      why = "";
    },
    viewers: ({ viewers }) => {
      const typists = viewers.filter(({ mode }) => mode === "rw").length;
      part("viewers").textContent = `${viewers.length} here, ${typists} may type`;
    },
    ended: ({ state, exit_status: status }) => {
      terminal.options.disableStdin = part("readonly").disabled = true;
      part("viewers").textContent = "";
      say(status === null || status === undefined ? `ended: ${state}` : `ended with status ${status}`);
    },
  };
  return (news) => told[news.t]?.(news);
}

const id = location.pathname.split("/")[3];
(id ? show(id) : list()).catch((error) => say(error.message, "bad"));
