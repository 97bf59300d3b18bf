"use strict";
const WORDS = {
  en: {
    model: "Model", beside: "Beside it", none: "none", mode: "Mode", chat: "Chat", text: "Continue a text",
    probabilities: "Token probabilities", language: "Language", settings: "Settings", system: "System prompt",
    temperature: "Temperature", top_p: "Top-p", max_tokens: "Most tokens", seed: "Seed", key: "API key",
    defaults: "What is left empty is as the model's generation_config.json has it.",
    send: "Send", stop: "Stop", clear: "Clear", message: "Write a message; Ctrl+Enter sends it",
    own: "The model's own probabilities, at temperature 1 and before tokens are left out.",
    no_server: "The server cannot be reached.", need_key: "The server asks for its API key: give it under Settings.",
    stopped: "stopped", cut: "cut at the most tokens", you: "You",
  },
  zh: {
    model: "模型", beside: "对比模型", none: "无", mode: "模式", chat: "对话", text: "续写文本",
    probabilities: "显示词元概率", language: "语言", settings: "设置", system: "系统提示词",
    temperature: "温度", top_p: "Top-p", max_tokens: "最多词元数", seed: "随机种子", key: "API 密钥",
    defaults: "留空的项取模型 generation_config.json 中的值。",
    send: "发送", stop: "停止", clear: "清空", message: "输入消息；Ctrl+Enter 发送",
    own: "模型自身的概率：温度为 1，未经截断。",
    no_server: "无法连接服务器。", need_key: "服务器要求 API 密钥：请在“设置”中填写。",
    stopped: "已停止", cut: "已达最多词元数", you: "你",
  },
};
const $ = (id) => document.getElementById(id);
const TOP = 5;
let words = WORDS.en;
let histories = [[], []]; // of the two models: what each was asked and has answered
let running = null; // AbortController of the answers that are being written
let begun = 0; // conversations since the page was opened: an answer of an earlier one is not remembered

// ---- language --------------------------------------------------------------------------------------------------------

function setLanguage(language) {
  words = WORDS[language];
  document.documentElement.lang = language;
  $("language").value = language;
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = words[element.dataset.say];
  $("message").placeholder = words.message;
  $("message").setAttribute("aria-label", words.message);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- the server ------------------------------------------------------------------------------------------------------

function headers() {
  const fields = { "Content-Type": "application/json" };
  if ($("key").value) fields.Authorization = "Bearer " + $("key").value;
  return fields;
}

async function refusal(response) {
  if (response.status === 401) return words.need_key;
  try {
    return (await response.json()).error.message;
  } catch {
    return "HTTP " + response.status;
  }
}

async function loadModels() {
  let response;
  try {
    response = await fetch("/v1/models", { headers: headers() });
  } catch {
    notice(words.no_server);
    return;
  }
  if (!response.ok) {
    notice(await refusal(response));
    $("settings").open = true;
    return;
  }
  notice("");
  const names = (await response.json()).data.map((model) => model.id);
  const none = new Option(words.none, "");
  none.dataset.say = "none";
  $("model-a").replaceChildren(...names.map((name) => new Option(name, name)));
  $("model-b").replaceChildren(none, ...names.map((name) => new Option(name, name)));
  if (names.length > 1) $("model-b").value = names[1];
}

function body(model, history, text) {
  const isChat = $("mode").value === "chat";
  const fields = { model, stream: true, max_tokens: Number($("max_tokens").value) || 256 };
  for (const name of ["temperature", "top_p", "seed"]) {
    if ($(name).value !== "") fields[name] = Number($(name).value);
  }
  if (!isChat) {
    fields.prompt = text;
    if ($("probabilities").checked) fields.logprobs = TOP;
    return fields;
  }
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  fields.messages = [...system, ...history, { role: "user", content: text }];
  if ($("probabilities").checked) Object.assign(fields, { logprobs: true, top_logprobs: TOP });
  return fields;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// ---- tokens ----------------------------------------------------------------------------------------------------------

// A chunk's tokens, as {bytes or text, logprob, top: [[text, logprob]]}, from both routes' forms.
function tokensOf(choice) {
  const found = choice.logprobs;
  if (!found) return [];
  if (found.content) {
    return found.content.map((entry) => ({
      text: entry.token, bytes: entry.bytes, logprob: entry.logprob,
      top: entry.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return found.tokens.map((text, place) => ({
    text, bytes: null, logprob: found.token_logprobs[place], top: Object.entries(found.top_logprobs[place]),
  }));
}

function shown(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
}

function level(probability) {
  return [0.05, 0.2, 0.5, 0.8].filter((bound) => probability >= bound).length;
}

// Spans of the tokens of an answer. Bytes of one character may come in several tokens: those are one span's text.
class TokenView {
  constructor(element) {
    this.element = element;
    this.decoder = new TextDecoder();
  }

  add(token) {
    const span = document.createElement("span");
    const probability = Math.exp(token.logprob);
    const text = token.bytes ? this.decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.text;
    span.className = "t p" + level(probability);
    span.textContent = text || "·";
    span.title = (100 * probability).toFixed(1) + "%";
    span.token = token;
    this.element.append(span);
  }
}

function showToken(span) {
  for (const other of document.querySelectorAll(".t.chosen")) other.classList.remove("chosen");
  span.classList.add("chosen");
  const { text, logprob, top } = span.token;
  const rows = top.some((entry) => entry[0] === text) ? top : [[text, logprob], ...top];
  $("token").querySelector("h2").textContent = shown(text) + "  " + (100 * Math.exp(logprob)).toFixed(2) + "%";
  $("token").querySelector(".bars").replaceChildren(...rows.map(([other, value]) => {
    const row = document.createElement("div");
    const name = document.createElement("code");
    const bar = document.createElement("progress");
    const number = document.createElement("span");
    row.className = other === text ? "bar taken" : "bar";
    name.textContent = shown(other);
    bar.max = 1;
    bar.value = Math.exp(value);
    bar.setAttribute("aria-label", shown(other));
    number.textContent = (100 * Math.exp(value)).toFixed(1) + "%";
    row.append(name, bar, number);
    return row;
  }));
  $("token").hidden = false;
}

// ---- a turn ----------------------------------------------------------------------------------------------------------

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

async function answer(model, place, text, box, signal) {
  const said = box.querySelector(".said");
  const conversation = begun;
  let complete = "";
  const isChat = $("mode").value === "chat";
  let view = null;
  try {
    const route = isChat ? "/v1/chat/completions" : "/v1/completions";
    const asked = body(model, histories[place], text);
    const response = await fetch(route, { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        const piece = isChat ? choice.delta.content || "" : choice.text;
        complete += piece;
        if (asked.logprobs === undefined) {
          said.append(piece);
        } else {
          view ??= new TokenView(said);
          for (const token of tokensOf(choice)) view.add(token);
        }
        if (choice.finish_reason === "length") box.append(element("p", "soft", words.cut));
      }
    }
    if (isChat && conversation === begun) {
      histories[place].push({ role: "user", content: text }, { role: "assistant", content: complete });
    }
  } catch (error) {
    if (error.name === "AbortError") {
      box.append(element("p", "soft", words.stopped));
      if (complete && isChat && conversation === begun) {
        histories[place].push({ role: "user", content: text }, { role: "assistant", content: complete });
      }
    } else {
      box.append(element("p", "error", error instanceof TypeError ? words.no_server : error.message));
    }
  }
  box.dataset.done = "yes";
}

async function ask(text) {
  const turn = element("section", "turn");
  const answers = element("div", "answers");
  const models = [$("model-a").value, $("model-b").value];
  turn.append(element("div", "asked", text), answers);
  $("talk").append(turn);
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const all = [];
  models.forEach((model, place) => {
    if (!model) return;
    const box = element("article", "answer");
    box.append(element("h3", "", model), element("div", "said"));
    answers.append(box);
    all.push(answer(model, place, text, box, running.signal));
  });
  turn.scrollIntoView({ block: "end" });
  await Promise.all(all);
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  turn.scrollIntoView({ block: "end" });
}

function clear() {
  running?.abort();
  begun += 1;
  histories = [[], []];
  $("talk").replaceChildren();
  $("token").hidden = true;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value;
  if (!text.trim() || running) return;
  $("message").value = "";
  ask(text);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("close-token").addEventListener("click", () => { $("token").hidden = true; });
$("talk").addEventListener("click", (event) => {
  if (event.target.token) showToken(event.target);
});
$("language").addEventListener("change", () => setLanguage($("language").value));
for (const id of ["model-a", "model-b", "mode", "system"]) $(id).addEventListener("change", clear);
$("key").addEventListener("change", loadModels);
setLanguage(navigator.language.startsWith("zh") ? "zh" : "en");
loadModels().then(() => { document.documentElement.dataset.ready = "yes"; });
