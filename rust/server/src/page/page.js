// The page: asks /status once a second while it is seen, and lets people try a model.

const KEY = "slora.key";
const NUM_CELLS = 240;
const NUM_SAMPLES = 300;
const OWNERS = [
  ["kv", "KV cache"],
  ["adapters", "adapters in use"],
  ["idle_adapters", "idle adapters"],
  ["free", "free"],
];
const TIERS = [
  ["On the device", ["resident"]],
  ["In host memory", ["host"]],
  ["On disk", ["loading", "registered"]],
  ["Failed", ["failed"]],
];

const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
};

/** An element with a class and children, which are text or elements. */
function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

// --- what is asked for

let last = null;
let rates = [];

async function look() {
  if (!document.hidden) await refresh();
  setTimeout(look, 1000);
}

async function refresh() {
  const key = sessionStorage.getItem(KEY);
  let answer;
  try {
    answer = await fetch("status", { headers: headers(), signal: AbortSignal.timeout(5000) });
  } catch {
    return showState("unready", "the server does not answer");
  }
  const found = await answer.json().catch(() => ({ error: { message: answer.statusText } }));
  // Another key was given meanwhile, or this one forgotten: the answer is not to what is asked now.
  if (sessionStorage.getItem(KEY) !== key) return;
  if (answer.ok) return show(found);
  if (answer.status === 401) return askForKey(found.error.message);
  showState("unready", found.error.message);
}

function askForKey(problem) {
  const wasWrong = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  if (wasWrong) at("key-problem").textContent = problem;
  showState("", "waiting for a key");
  at("board").hidden = true;
  if (at("gate").hidden) {
    at("gate").hidden = false;
    at("key").focus();
  }
}

// --- what is shown

function showState(name, text) {
  at("state").className = `state ${name}`;
  if (at("state-text").textContent !== text) at("state-text").textContent = text;
}

function show(status) {
  at("gate").hidden = true;
  at("board").hidden = false;
  at("forget").hidden = sessionStorage.getItem(KEY) === null;
  at("model").textContent = status.model;
  showState(status.unready ? "unready" : "ready", status.unready ?? `ready · ${status.version}`);
  showRate(status);
  at("running").value = number.format(status.running);
  at("waiting").value = number.format(status.waiting);
  const forAdapter = status.waiting_for_adapter;
  at("waiting-note").textContent = forAdapter ? `${number.format(forAdapter)} for their adapter` : "";
  const known = Object.values(status.adapter_states).reduce((sum, count) => sum + count, 0);
  at("resident").value = number.format(status.adapter_states.resident);
  at("resident-note").textContent = `of ${number.format(known)}`;
  showPool(status.pool);
  showAdapters(status);
}

function showRate(status) {
  const now = performance.now();
  if (last && now > last.now && status.generated_tokens >= last.tokens) {
    rates.push({ now, rate: ((status.generated_tokens - last.tokens) / (now - last.now)) * 1000 });
    rates = rates.filter((sample) => now - sample.now < NUM_SAMPLES * 1000);
    at("rate").value = number.format(rates.at(-1).rate);
    drawPlot(now);
  }
  last = { now, tokens: status.generated_tokens };
}

function drawPlot(now) {
  const most = niceLimit(Math.max(1, ...rates.map((sample) => sample.rate)));
  const x = (sample) => 600 - ((now - sample.now) / (NUM_SAMPLES * 1000)) * 600;
  const y = (sample) => 178 - (sample.rate / most) * 170;
  const points = rates.map((sample) => `${x(sample).toFixed(1)} ${y(sample).toFixed(1)}`);
  at("plot-line").setAttribute("d", `M${points.join("L")}`);
  at("plot-area").setAttribute("d", `M${x(rates[0]).toFixed(1)} 180L${points.join("L")}L600 180Z`);
  at("plot-most").textContent = number.format(most);
  at("plot").setAttribute("aria-label", `Now ${number.format(rates.at(-1).rate)} tokens per second`);
}

/** A short number that is not less. */
function niceLimit(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].find((factor) => factor * power >= value) * power;
}

function showPool(pool) {
  const pages = {
    kv: pool.kv,
    adapters: pool.adapters - pool.idle_adapters,
    idle_adapters: pool.idle_adapters,
    free: pool.free,
  };
  const cells = at("cells");
  while (cells.children.length < NUM_CELLS) cells.append(make("i"));
  let place = 0;
  let sum = 0;
  for (const [owner] of OWNERS) {
    sum += pages[owner];
    // Whoever has a page has a cell, however large the pool is.
    const end = Math.max(Math.round((sum / pool.pages) * NUM_CELLS), place + Math.sign(pages[owner]));
    for (; place < end && place < NUM_CELLS; place++) cells.children[place].className = `of-${owner}`;
  }
  const share = (owner) => `${((pages[owner] / pool.pages) * 100).toFixed(1)} %`;
  const told = OWNERS.map(([owner, label]) => `${label} ${share(owner)}`).join(", ");
  cells.setAttribute("aria-label", `${number.format(pool.pages)} pages: ${told}`);
  at("pool-legend").replaceChildren(
    ...OWNERS.map(([owner, label]) =>
      make("li", "", make("span", `key of-${owner}`), `${label} `, make("b", "", number.format(pages[owner])), share(owner)),
    ),
  );
}

let shownAdapters = "";

function showAdapters(status) {
  const filter = at("filter").value.trim().toLowerCase();
  const key = JSON.stringify([status.adapters, status.adapter_states, filter]);
  if (key === shownAdapters) return;
  shownAdapters = key;
  const focused = document.activeElement?.dataset?.name;
  at("tiers").replaceChildren(...TIERS.map((tier) => makeTier(tier, status, filter)).filter(Boolean));
  if (focused) document.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
  const names = [status.model, ...status.adapters.map((adapter) => adapter.name)];
  at("models").replaceChildren(...names.map((name) => Object.assign(make("option"), { value: name })));
  if (!at("try-model").placeholder) at("try-model").placeholder = status.model;
}

function makeTier([title, states], status, filter) {
  const count = states.reduce((sum, state) => sum + status.adapter_states[state], 0);
  if (title === "Failed" && count === 0) return null;
  const listed = status.adapters.filter(({ name, state }) => states.includes(state) && name.toLowerCase().includes(filter));
  const tier = make("section", "tier", make("h3", "", title, make("span", "", number.format(count))));
  if (listed.length) tier.append(make("ul", "names", ...listed.map((adapter) => make("li", "", makeName(adapter)))));
  else tier.append(make("p", "none", count ? "none of this name" : "none"));
  return tier;
}

function makeName(adapter) {
  const requests = adapter.running + adapter.waiting;
  const button = make("button", requests ? "busy" : adapter.state, adapter.name);
  if (requests) button.append(make("b", "", number.format(requests)));
  button.type = "button";
  button.dataset.name = adapter.name;
  const traffic = `${adapter.running} running, ${adapter.waiting} waiting`;
  button.title = `version ${adapter.version}, ${number.format(adapter.bytes / 1000)} kB, ${traffic}${adapter.pinned ? ", pinned" : ""}`;
  button.addEventListener("click", () => {
    at("try-model").value = adapter.name;
    at("try-prompt").focus();
  });
  return button;
}

// --- trying a model

let running = null;

async function send(event) {
  event.preventDefault();
  running?.abort();
  running = new AbortController();
  const answer = at("try-answer");
  answer.textContent = "";
  at("try-stop").disabled = false;
  note("waiting for the first token");
  const times = { start: performance.now(), first: null, tokens: 0 };
  try {
    await stream(running.signal, (text) => {
      times.first ??= performance.now();
      times.tokens += 1;
      answer.append(text);
      answer.scrollTop = answer.scrollHeight;
      note(summary(times));
    });
    note(times.tokens ? summary(times) : "the answer is empty");
  } catch (error) {
    if (error.name === "AbortError") note(times.tokens ? `stopped · ${summary(times)}` : "stopped");
    else note(error.message, true);
  }
  at("try-stop").disabled = true;
}

function summary({ start, first, tokens }) {
  const rate = ((tokens - 1) / Math.max(performance.now() - first, 1)) * 1000;
  const speed = tokens > 1 ? ` · ${number.format(rate)} tok/s` : "";
  return `${number.format(tokens)} tokens · first after ${number.format(first - start)} ms${speed}`;
}

function note(text, isProblem = false) {
  at("try-note").textContent = text;
  at("try-note").className = isProblem ? "note problem" : "note";
}

/** Sends the form's request and calls `take` with the text of each event. */
async function stream(signal, take) {
  const isChat = at("try-kind").value === "chat";
  const prompt = at("try-prompt").value;
  const body = { max_tokens: Number(at("try-tokens").value), stream: true };
  if (at("try-model").value) body.model = at("try-model").value;
  if (at("try-temperature").value) body.temperature = Number(at("try-temperature").value);
  Object.assign(body, isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt });
  const response = await fetch(isChat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    const text = choice?.delta ? choice.delta.content : choice?.text;
    if (text) take(text);
  }
}

/** The JSON of each event until the stream's end. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts.filter((part) => part.startsWith("data: "))) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

// --- the beginning

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  at("key-problem").textContent = "";
  refresh();
});
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  running?.abort();
  refresh();
});
at("try-form").addEventListener("submit", send);
at("try-stop").addEventListener("click", () => running?.abort());
at("try-prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("try-form").requestSubmit();
});
look();
