"use strict";

// A chat with the base alone and with value networks, side by side. The two columns are two
// conversations with the same questions; a slider that moves answers the last question again.

const byId = (id) => document.getElementById(id);
const ALTERNATIVES = 5;
const STRONGEST = 4; // a change of this many nats has the full colour
const MOST_TOKENS = 256;

let base = "";
let overview = "";
let values = [];
let turns = [];
let running = [];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function headers() {
  const key = byId("api-key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function fail(response) {
  const error = new Error(`status ${response.status}`);
  error.status = response.status;
  try {
    ({ message: error.message, code: error.code } = (await response.json()).error);
  } catch { /* not one of the server's own answers */ }
  throw error;
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) await fail(response);
  const models = (await response.json()).data;
  base = models[0].id;
  const contexts = models.map((model) => model.max_model_len);
  byId("max-tokens").max = Math.max(...contexts);
  // A base alone may never end: what it writes leaves room for the next questions.
  byId("max-tokens").value = Math.max(1, Math.min(MOST_TOKENS, Math.floor(Math.min(...contexts) / 4)));
  values = models
    .filter((model) => model.id.startsWith(`${base}+`))
    .map((model) => model.id.slice(base.length + 1));
  byId("sliders").replaceChildren(...values.map((name, index) => {
    const model = models.find((one) => one.id === `${base}+${name}`);
    const strength = index === 0 ? model.strengths[name] ?? 1 : 0;
    const most = Math.max(2, Math.abs(strength)); // the server's default may be beyond
    const input = make("input", {
      type: "range", id: `strength-${name}`, min: -most, max: most, step: 0.05, value: strength,
    });
    const shown = make("output", { for: input.id }, Number(input.value).toFixed(2));
    input.addEventListener("input", () => { shown.value = Number(input.value).toFixed(2); });
    input.addEventListener("change", answerAgain);
    return make("div", { class: "slider" }, make("label", { for: input.id }, name), input, shown);
  }));
  overview = values.length
    ? `${base}, and with ${values.join(", ")}`
    : `${base}; no value network is loaded`;
  byId("status").textContent = overview;
}

function strengths() {
  return Object.fromEntries(values.map((name) => [name, Number(byId(`strength-${name}`).value)]));
}

function columns() {
  const alone = { title: `${base} alone`, model: base, strengths: {} };
  if (!values.length) return [alone];
  const all = strengths();
  const shown = values.map((name) => `${name} ${all[name]}`).join(", ");
  // The model's own value network brings the template, the stop ids and the context.
  const first = values.find((name) => all[name] !== 0) ?? values[0];
  return [alone, { title: `with ${shown}`, model: `${base}+${first}`, strengths: all }];
}

function showToken(span) {
  for (const old of document.querySelectorAll(".token.chosen")) old.classList.remove("chosen");
  span.classList.add("chosen");
  const { token, logprob, base_logprob: alone, top_logprobs: top } = span.data;
  const percent = (value) => `${(100 * Math.exp(value)).toFixed(2)} %`;
  const rows = top.map((one) => make("tr", {},
    make("td", {}, make("code", {}, JSON.stringify(one.token))), make("td", {}, percent(one.logprob))));
  byId("token").replaceChildren(
    make("p", {}, make("code", {}, JSON.stringify(token)),
      `: ${percent(logprob)}, under the base alone ${percent(alone)}`),
    make("table", {}, make("thead", {}, make("tr", {},
      make("th", { scope: "col" }, "likeliest here"), make("th", { scope: "col" }, "probability"))),
    make("tbody", {}, ...rows)));
}

function tokenSpan(data, text) {
  const span = make("span", { class: "token" }, text);
  span.data = data;
  const change = data.logprob - data.base_logprob;
  const strength = Math.min(1, Math.abs(change) / STRONGEST) * 0.6;
  if (strength > 0.02) {
    span.style.backgroundColor = `rgba(var(--${change > 0 ? "more" : "less"}), ${strength})`;
  }
  span.addEventListener("mouseenter", () => showToken(span));
  span.addEventListener("click", () => showToken(span));
  return span;
}

function moveWithArrows(event) {
  const spans = [...event.currentTarget.querySelectorAll(".token")];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !spans.length) return;
  event.preventDefault();
  const now = spans.findIndex((span) => span.classList.contains("chosen"));
  const next = now < 0 ? (step > 0 ? 0 : spans.length - 1) : now + step;
  showToken(spans[Math.max(0, Math.min(spans.length - 1, next))]);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Both answers of a turn may end at once: what is said of one does not replace the other's.
function announce(cell, ending) {
  cell.ending = ending;
  const endings = turns.at(-1)?.cells.map((one) => one.ending) ?? [];
  const said = endings.filter(Boolean).join(" · ");
  if (said) byId("status").textContent = said;
}

async function answer(turn, index, column) {
  const cell = turn.cells[index];
  cell.stopped?.abort();
  const stopped = cell.stopped = new AbortController();
  running.push(stopped);
  cell.title.textContent = column.title;
  cell.text.replaceChildren();
  cell.text.setAttribute("aria-busy", "true");
  cell.content = "";
  cell.ending = "";
  cell.failed = false;
  const before = turns.slice(0, turns.indexOf(turn)).filter((one) => !one.cells[index].failed);
  const messages = [
    ...before.flatMap((one) => [
      { role: "user", content: one.question },
      { role: "assistant", content: one.cells[index].content.trim() },
    ]),
    { role: "user", content: turn.question },
  ];
  const body = {
    model: column.model, strengths: column.strengths, messages, stream: true, logprobs: true,
    top_logprobs: ALTERNATIVES, temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("max-tokens").value), seed: 0,
  };
  const decoder = new TextDecoder();
  let ending = "answer complete";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: stopped.signal,
    });
    if (!response.ok) await fail(response);
    for await (const event of events(response)) {
      const choice = event.choices[0];
      cell.content += choice?.delta.content ?? "";
      for (const token of choice?.logprobs?.content ?? []) {
        const text = decoder.decode(new Uint8Array(token.bytes), { stream: true });
        cell.text.append(tokenSpan(token, text));
      }
    }
  } catch (error) {
    cell.failed = error.name !== "AbortError";
    const beyond = error.code === "context_length_exceeded" && before.length;
    const message = beyond ? `${error.message}, or start a new conversation` : error.message;
    ending = cell.failed ? `answer failed: ${message}` : "answer stopped";
    if (cell.failed) cell.text.append(make("p", { class: "error" }, message));
  }
  if (cell.stopped === stopped) { // not replaced by a newer answer
    cell.text.setAttribute("aria-busy", "false");
    announce(cell, `${column.title}: ${ending}`);
  }
  running = running.filter((one) => one !== stopped);
}

function answerAgain() {
  const turn = turns.at(-1);
  if (turn && turn.cells.length > 1) answer(turn, 1, columns()[1]);
}

function ask(question) {
  const shown = columns();
  const cells = shown.map((column, index) => {
    const id = `answer-${turns.length}-${index}`;
    const title = make("h3", { id }, column.title);
    const text = make("div", { class: "text", tabindex: 0, role: "group", "aria-labelledby": id });
    text.addEventListener("keydown", moveWithArrows);
    return { title, text, content: "", ending: "" };
  });
  const turn = { question, cells };
  turns.push(turn);
  byId("turns").append(make("li", {},
    make("p", { class: "question" }, question),
    make("div", { class: "answers" },
      ...cells.map((cell) => make("div", { class: "answer" }, cell.title, cell.text)))));
  shown.forEach((column, index) => answer(turn, index, column));
}

function stopAll() {
  for (const one of running) one.abort();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || !base) return;
  byId("question").value = "";
  ask(question);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", stopAll);
byId("reset").addEventListener("click", () => {
  stopAll();
  turns = [];
  byId("turns").replaceChildren();
  byId("token").replaceChildren();
  byId("status").textContent = overview;
});

function start() {
  loadModels().catch((error) => {
    let { message } = error;
    if (error.status === 401) {
      const key = byId("api-key");
      message = key.value ? "this is not the server's API key" : "the server asks for an API key";
      byId("settings").open = true;
      key.focus();
    }
    byId("status").textContent = message;
  });
}
byId("api-key").addEventListener("change", start);
start();
