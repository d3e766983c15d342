// The page: choose adapters, send one prompt to all of them, watch the answers grow.

import { get, rememberKey, ServerError, stream } from "./stream.js";

const SHOWN = 200;
const HISTORY = 60;
const BASE = "";
const id = (name) => document.getElementById(name);

const state = { base: "", adapters: [], chosen: new Set(), abort: null, rates: [], lost: false };

// --- the list of adapters

async function loadAdapters() {
  const { base, adapters } = await get("/lorakit/adapters");
  const first = state.base === "";
  state.base = base;
  state.adapters = adapters;
  id("base").textContent = base;
  document.title = `lorakit: ${base}`;
  id("count").textContent = adapters.length.toLocaleString("en");
  if (first) {
    const usable = adapters.filter((adapter) => !adapter.problem).slice(0, 2);
    state.chosen = new Set([BASE, ...usable.map((adapter) => adapter.name)]);
  }
  showAdapters();
}

function showAdapters() {
  const wanted = id("filter").value.trim().toLowerCase();
  const base = { name: BASE, state: "base" };
  const matching = [base, ...state.adapters].filter(
    (adapter) => !wanted || nameOf(adapter.name).toLowerCase().includes(wanted),
  );
  const list = id("adapters");
  const scrolled = list.scrollTop;
  list.replaceChildren(...matching.slice(0, SHOWN).map(row));
  list.scrollTop = scrolled;
  const left = matching.length - SHOWN;
  id("more").hidden = left <= 0;
  id("more").textContent = `and ${left.toLocaleString("en")} more: type to filter`;
  id("send").disabled = state.chosen.size === 0;
}

function nameOf(name) {
  return name === BASE ? state.base : name;
}

function row(adapter) {
  const item = id("adapter-row").content.cloneNode(true).firstElementChild;
  const box = item.querySelector("input");
  const badge = item.querySelector(".badge");
  const about = item.querySelector(".about");
  item.querySelector(".name").textContent = nameOf(adapter.name);
  item.querySelector(".name").title = nameOf(adapter.name);
  box.checked = state.chosen.has(adapter.name);
  box.addEventListener("change", () => {
    if (box.checked) state.chosen.add(adapter.name);
    else state.chosen.delete(adapter.name);
    id("send").disabled = state.chosen.size === 0;
  });
  if (adapter.name === BASE) {
    badge.textContent = "base";
    about.hidden = true;
    return item;
  }
  badge.textContent = adapter.problem ? "refused" : adapter.r ? `r = ${adapter.r}` : "adapter";
  badge.title = adapter.problem ?? `${where[adapter.state]}`;
  badge.classList.add(adapter.state);
  if (adapter.problem) {
    item.classList.add("refused");
    box.disabled = true;
  }
  about.setAttribute("aria-label", `passport of ${adapter.name}`);
  about.addEventListener("click", () => guarded(() => showPassport(adapter.name)));
  return item;
}

const where = { disk: "on disk", ram: "in memory", device: "on the device" };

// --- passports

async function showPassport(name) {
  const found = await get(`/lorakit/adapters/${encodeURIComponent(name)}`);
  const passport = found.passport ?? {};
  id("passport-name").textContent = name;
  const groups = [
    [
      "",
      {
        state: found.problem ?? where[found.state],
        method: passport.method,
        "trained parameters": found.num_params?.toLocaleString("en"),
        base: passport.model ?? passport.base?.name,
        "content hash": found.key?.slice(0, 16),
      },
    ],
    ["LoRA", { r: found.r, ...passport.spec }],
    ["Metrics", passport.metrics],
    ["Data", dataFacts(passport.data)],
    ["Training", trainingFacts(passport)],
  ];
  const parts = groups.flatMap(([title, values]) => factList(title, values));
  parts.push(...everything(passport));
  if (Object.keys(passport).length === 0) {
    const note = document.createElement("p");
    note.className = "soft";
    note.textContent = "This adapter came without a passport (lorakit.json).";
    parts.push(note);
  }
  id("passport-facts").replaceChildren(...parts);
  id("passport").showModal();
}

// What is asked first of the data; the rest is under "everything".
function dataFacts(data) {
  const facts = {};
  for (const [split, about] of Object.entries(data ?? {})) {
    if (!about || typeof about !== "object") continue;
    const learned = about.report?.num_learned_tokens;
    const parts = [about.source, about.num_rows && `${about.num_rows.toLocaleString("en")} rows`];
    parts.push(learned && `${learned.toLocaleString("en")} learned tokens`);
    facts[split] = parts.filter(Boolean).join(", ");
  }
  return facts;
}

function trainingFacts(passport) {
  const { epochs, lr, batch_size, schedule, optimizer } = passport.config?.train ?? {};
  const system = passport.config?.data?.system;
  return { epochs, "learning rate": lr, "batch size": batch_size, schedule, optimizer, seed: passport.seed, system };
}

function everything(passport) {
  const [list] = factList("", passport);
  if (!list) return [];
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "everything in the passport";
  details.append(summary, list);
  return [details];
}

function factList(title, values) {
  const facts = Object.entries(flat(values)).filter(([, value]) => value !== "");
  if (facts.length === 0) return [];
  const list = document.createElement("dl");
  for (const [name, value] of facts) {
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    list.append(term, text);
  }
  if (!title) return [list];
  const heading = document.createElement("h3");
  heading.textContent = title;
  return [heading, list];
}

function flat(values, prefix = "") {
  const facts = {};
  for (const [key, value] of Object.entries(values ?? {})) {
    const name = prefix + key.replaceAll("_", " ");
    if (value === null || value === undefined) continue;
    if (Array.isArray(value)) facts[name] = value.map(String).join(", ");
    else if (typeof value === "object") Object.assign(facts, flat(value, `${name}, `));
    else if (typeof value === "number" && !Number.isInteger(value)) facts[name] = String(+value.toPrecision(5));
    else facts[name] = String(value);
  }
  return facts;
}

// --- answers

class Answer {
  constructor(name) {
    this.name = name;
    this.card = id("answer-card").content.cloneNode(true).firstElementChild;
    this.text = this.card.querySelector(".text");
    this.card.querySelector("h3").textContent = nameOf(name);
    this.sent = performance.now();
    this.tokens = 0;
    this.logprobs = 0;
    this.card.classList.add("busy");
    this.say("waiting");
  }

  say(words) {
    this.card.querySelector(".state").textContent = words;
  }

  fact(name, value) {
    this.card.querySelector(`[data-fact=${name}]`).textContent = value;
  }

  async run(body, path, signal) {
    try {
      for await (const chunk of stream(path, body, signal)) this.take(chunk);
      this.card.classList.remove("busy");
    } catch (error) {
      this.card.classList.remove("busy");
      if (error.name === "AbortError") this.say("stopped");
      else this.fail(error);
    }
  }

  fail(error) {
    this.card.classList.add("failed");
    this.say("failed");
    this.text.append(error.message);
  }

  take(chunk) {
    if (chunk.usage) {
      this.finish(chunk);
      return;
    }
    const [choice] = chunk.choices;
    const text = choice.delta ? choice.delta.content ?? "" : choice.text;
    const tokens = tokensOf(choice.logprobs);
    if (tokens.length > 0 && this.tokens === 0) {
      this.first = performance.now();
      this.fact("first", seconds((this.first - this.sent) / 1000));
      this.say("writing");
    }
    this.tokens += tokens.length;
    for (const token of tokens) this.logprobs += token.logprob;
    this.show(text, tokens);
    if (this.tokens > 0) {
      this.fact("tokens", this.tokens);
      this.fact("probability", percent(Math.exp(this.logprobs / this.tokens)));
    }
    if (this.tokens > 1) {
      this.fact("rate", ((this.tokens - 1) / ((performance.now() - this.first) / 1000)).toFixed(1));
    }
    if (choice.finish_reason) this.say(ends[choice.finish_reason] ?? choice.finish_reason);
  }

  // One span per token; where text and tokens do not line up (a character of several tokens, text
  // held back in front of a stop string) one span with the least likely of them.
  show(text, tokens) {
    if (!text) return;
    const together = tokens.map((token) => token.token).join("");
    const pieces = together === text ? tokens : [worst(text, tokens)];
    this.text.append(...pieces.map(span));
  }

  finish(chunk) {
    const [timings] = chunk.timings ?? [];
    this.fact("tokens", chunk.usage.completion_tokens);
    if (!timings || timings.first_token_s === null) return;
    this.fact("first", seconds(timings.first_token_s));
    const each = chunk.usage.completion_tokens - 1;
    if (each > 0) this.fact("rate", (each / (timings.total_s - timings.first_token_s)).toFixed(1));
  }
}

const ends = { stop: "finished", length: "cut at the limit" };

// Chat: objects with alternatives. Plain completions: parallel lists.
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      token: one.token,
      logprob: one.logprob,
      top: one.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return logprobs.tokens.map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {}),
  }));
}

function worst(text, tokens) {
  const logprob = tokens.length ? Math.min(...tokens.map((token) => token.logprob)) : 0;
  return { token: text, logprob, top: [] };
}

function span({ token, logprob, top }) {
  const element = document.createElement("span");
  const p = Math.exp(logprob);
  const band = [0.05, 0.2, 0.5, 0.8].filter((limit) => p >= limit).length;
  element.className = `p${band}`;
  element.textContent = token;
  const others = top.map(([text, value]) => `${percent(Math.exp(value))}  ${JSON.stringify(text)}`);
  element.title = [percent(p), ...others].join("\n");
  return element;
}

function percent(p) {
  return `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`;
}

function seconds(s) {
  return s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(2)} s`;
}

function bodyFor(name, prompt) {
  const seed = id("seed").value;
  const common = {
    model: nameOf(name),
    max_tokens: Number(id("max-tokens").value),
    temperature: Number(id("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
  if (id("mode").value === "text") return ["/v1/completions", { ...common, prompt, logprobs: 3 }];
  const system = id("system").value;
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  return ["/v1/chat/completions", { ...common, messages, logprobs: true, top_logprobs: 3 }];
}

async function ask() {
  const prompt = id("prompt").value;
  if (!prompt.trim() || state.chosen.size === 0) return;
  state.abort?.abort();
  const abort = new AbortController();
  state.abort = abort;
  const known = [BASE, ...state.adapters.map((adapter) => adapter.name)];
  const answers = known.filter((name) => state.chosen.has(name)).map((name) => new Answer(name));
  id("answers").replaceChildren(...answers.map((answer) => answer.card));
  id("stop").hidden = false;
  await Promise.all(
    answers.map((answer) => {
      const [path, body] = bodyFor(answer.name, prompt);
      return answer.run(body, path, abort.signal);
    }),
  );
  if (state.abort === abort) id("stop").hidden = true;
  await guarded(loadAdapters);
}

// --- live numbers

async function watch() {
  try {
    const stats = await get("/lorakit/stats");
    state.rates = [...state.rates, stats.tokens_per_s].slice(-HISTORY);
    id("rate").textContent = stats.tokens_per_s.toFixed(stats.tokens_per_s < 10 ? 1 : 0);
    id("running").textContent = stats.running;
    id("waiting").textContent = stats.waiting;
    id("loaded").textContent = stats.adapters_ram;
    drawRates();
    if (state.lost) notice("");
    state.lost = false;
  } catch (error) {
    state.lost = !(error instanceof ServerError);
    if (state.lost) notice("The server does not answer.");
  }
  setTimeout(watch, 1000);
}

function drawRates() {
  const top = Math.max(...state.rates, 1);
  const step = 120 / (HISTORY - 1);
  const start = 120 - (state.rates.length - 1) * step;
  const points = state.rates.map((rate, i) => `${(start + i * step).toFixed(1)},${(27 - (25 * rate) / top).toFixed(1)}`);
  const [area, line] = id("spark").children;
  line.setAttribute("points", points.join(" "));
  area.setAttribute("points", `${start.toFixed(1)},28 ${points.join(" ")} 120,28`);
}

// --- what goes wrong

function notice(text) {
  id("notice").textContent = text;
  id("notice").hidden = text === "";
}

async function guarded(work) {
  try {
    await work();
  } catch (error) {
    if (error instanceof ServerError && error.status === 401) id("key-form").hidden = false;
    else notice(error.message);
  }
}

id("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
id("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
id("mode").addEventListener("change", () => {
  id("system").hidden = id("mode").value === "text";
});
id("stop").addEventListener("click", () => state.abort?.abort());
id("filter").addEventListener("input", showAdapters);
id("clear").addEventListener("click", () => {
  state.chosen.clear();
  showAdapters();
});
id("colour").addEventListener("change", () => {
  document.body.classList.toggle("uncoloured", !id("colour").checked);
  id("legend").hidden = !id("colour").checked;
});
id("passport-close").addEventListener("click", () => id("passport").close());
id("passport").addEventListener("click", (event) => {
  if (event.target === id("passport")) id("passport").close();
});
id("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  rememberKey(id("key").value);
  id("key-form").hidden = true;
  guarded(loadAdapters);
});

guarded(loadAdapters);
watch();
