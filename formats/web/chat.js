// A chat with the model in this folder, computed in the browser by transformers.js.
//
// settings.json, which export.py wrote, names the library's files with their hashes, the weights
// that are there, and the context. Works from any static host, such as `python -m http.server`.

const PROMPT_PART = 32; // tokens of the prompt computed at a time; the page reacts in between
const ORDER = { wasm: ["q8", "fp32", "q4", "fp16"], webgpu: ["fp32", "q4", "q8", "fp16"] };

/** Token ids of a message, in which a control token that is spelled stays ordinary text. */
function encode(tokenizer, text) {
  const { model, pre_tokenizer } = tokenizer._tokenizer; // not its encode(), which looks for them
  return model(pre_tokenizer(text, { section_index: 0 })).map((token) => model.tokens_to_ids.get(token));
}

/**
 * Token ids of the newest turns that fit, and how many messages were left out.
 *
 * A quarter of the context, or less for a shorter answer, is left for the answer.
 */
export function promptIds(tokenizer, messages, { context, control }, maxNewTokens) {
  const limit = context - Math.min(maxNewTokens, Math.floor(context / 4));
  const turns = messages.map(({ role, content }) => {
    const end = role === "assistant" ? [control.end] : [];
    return [control[role], ...encode(tokenizer, content), ...end];
  });
  for (let start = 0; start < messages.length; start += 2) {
    const ids = [control.start, ...turns.slice(start).flat(), control.assistant];
    if (ids.length <= limit) return { ids, dropped: start };
    if (start + 2 >= messages.length)
      throw new Error(`The message takes ${ids.length} tokens, and there is room for ${limit}: shorten it.`);
  }
}

/** The id of the next token: the likeliest, or one of the fewest whose probabilities reach topP. */
export function sample(logits, { temperature, topP, random = Math.random }) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 0)) return best;
  const weights = Float64Array.from(logits, (x) => Math.exp((x - logits[best]) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight);
  const likely = [...weights.keys()].filter((i) => weights[i] > 1e-9).sort((a, b) => weights[b] - weights[a]);
  let kept = 0;
  let sum = 0;
  while (kept < likely.length && sum < topP * total) sum += weights[likely[kept++]];
  let left = random() * sum;
  for (const i of likely.slice(0, kept)) if ((left -= weights[i]) < 0) return i;
  return best;
}

/** Yields the ids of an answer until a token in `stop`, `maxNewTokens`, the end of the context, or `stopped()`. */
export async function* generate({ Tensor, DynamicCache }, model, prompt, options) {
  const { context, maxNewTokens, stop, stopped = () => false } = options;
  const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const cache = new DynamicCache();
  try {
    let [todo, n] = [prompt, 0];
    for (let made = 0; made < maxNewTokens && n + todo.length <= context; made++) {
      let logits;
      while (todo.length) {
        const part = todo.slice(0, PROMPT_PART);
        todo = todo.slice(part.length);
        n += part.length;
        const inputs = { input_ids: tensor(part), attention_mask: tensor(Array(n).fill(1)) };
        const output = await model({ ...inputs, past_key_values: n > part.length ? cache : null });
        logits?.dispose();
        logits = output.logits;
        const present = Object.keys(output).filter((name) => name.startsWith("present"));
        cache.update(
          Object.fromEntries(present.map((name) => [name.replace("present", "past_key_values"), output[name]])),
        );
        await new Promise((resolve) => setTimeout(resolve)); // lets the page draw and hear the user
        if (stopped()) return;
      }
      const token = sample(logits.data.subarray(-logits.dims[2]), options);
      if (stop.includes(token)) return;
      yield token;
      todo = [token];
    }
  } finally {
    await cache.dispose();
  }
}

/** A file of the library as a URL, after its hash was checked. */
async function fetched({ url, integrity, type }) {
  const response = await fetch(url, { integrity });
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  return URL.createObjectURL(new Blob([await response.arrayBuffer()], { type }));
}

async function load(settings, progress) {
  const { library, dtypes } = settings;
  const urls = {};
  for (const [name, file] of Object.entries(library)) urls[name] = await fetched(file);
  const transformers = await import(urls.transformers);
  const { AutoModelForCausalLM, AutoTokenizer, env } = transformers;
  Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: new URL(".", location).href });
  Object.assign(env, { useBrowserCache: false, useWasmCache: false });
  env.backends.onnx.wasm.wasmPaths = { mjs: urls.runtime, wasm: urls.wasm };
  const tokenizer = await AutoTokenizer.from_pretrained(".");
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  for (const device of adapter ? ["webgpu", "wasm"] : ["wasm"]) {
    const order = adapter?.features.has("shader-f16") && device === "webgpu" ? ["fp16"] : [];
    const dtype = [...order, ...ORDER[device]].find((name) => dtypes.includes(name));
    try {
      const model = await AutoModelForCausalLM.from_pretrained(".", { dtype, device, progress_callback: progress });
      const first = generate(transformers, model, [settings.control.start], { context: 2, maxNewTokens: 1, stop: [] });
      for await (const token of first); // now, since a GPU may lack an operation
      return { transformers, tokenizer, model, device, dtype };
    } catch (error) {
      if (device === "wasm") throw error;
    }
  }
}

async function page() {
  const element = (name) => document.getElementById(name);
  const [chat, status, bar, form, message, send] = ["chat", "status", "progress", "form", "message", "send"].map(element);
  const say = (text) => (status.textContent = text);
  const value = (name, least, most) => Math.min(Math.max(Number(element(name).value) || 0, least), most);
  let [messages, stopped, busy] = [[], false, false];

  const show = (role, text) => {
    const line = document.createElement("p");
    line.className = role;
    line.textContent = text; // never HTML
    chat.append(line);
    chat.scrollTop = chat.scrollHeight;
    return line;
  };

  let settings, loaded;
  try {
    settings = await (await fetch("settings.json", { cache: "no-cache" })).json();
    document.title = document.querySelector("h1").textContent = settings.title;
    const bytes = {};
    loaded = await load(settings, ({ status: state, file, loaded: n, total }) => {
      if (state !== "progress" || !file.includes("onnx")) return;
      bytes[file] = [n, total];
      const [done, all] = [0, 1].map((i) => Object.values(bytes).reduce((sum, pair) => sum + pair[i], 0));
      bar.max = all || 1;
      bar.value = done;
      say(`Loading the model: ${(done / 1e6).toFixed(0)} of ${(all / 1e6).toFixed(0)} MB`);
    });
  } catch (error) {
    bar.hidden = true;
    say(`The model cannot be loaded: ${error.message ?? error}`);
    return;
  }
  const { transformers, tokenizer, model, device, dtype } = loaded;
  const ready = `Ready: ${dtype} on ${device === "webgpu" ? "the GPU" : "the CPU"}, in this browser`;

  async function answer(text) {
    const maxNewTokens = value("max_new_tokens", 1, settings.context);
    const stop = [settings.control.end, settings.control.user];
    const options = {
      ...{ context: settings.context, stop, maxNewTokens, stopped: () => stopped },
      ...{ temperature: value("temperature", 0, 2), topP: value("top_p", 0.05, 1) },
    };
    const asked = [...messages, { role: "user", content: text }];
    const { ids, dropped } = promptIds(tokenizer, asked, settings, maxNewTokens);
    message.value = "";
    const question = show("user", text);
    const line = show("assistant", "");
    say(dropped ? "The oldest turns no longer fit and were left out" : "Reading");
    const made = [];
    let start;
    try {
      for await (const token of generate(transformers, model, ids, options)) {
        start ??= performance.now();
        made.push(token);
        const answer = tokenizer.decode(made, { skip_special_tokens: true });
        line.textContent = answer.replace(/\ufffd+$/, ""); // a character that is not whole yet
        chat.scrollTop = chat.scrollHeight;
        const seconds = (performance.now() - start) / 1000;
        if (made.length > 1) say(`${made.length} tokens, ${((made.length - 1) / seconds).toFixed(1)} per second`);
      }
    } finally {
      if (!made.length) {
        // the question goes back to where it was typed
        message.value = text;
        question.remove();
        line.remove();
      }
    }
    if (made.length === 0) return say(stopped ? ready : "The model gave no answer");
    messages = [...asked.slice(dropped), { role: "assistant", content: line.textContent }];
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) {
      stopped = true;
      return;
    }
    if (!message.value.trim()) return;
    [busy, stopped, send.textContent] = [true, false, "Stop"];
    element("reset").disabled = true;
    try {
      await answer(message.value);
    } catch (error) {
      say(error.message ?? String(error));
    }
    [busy, send.textContent] = [false, "Send"];
    element("reset").disabled = false;
    message.focus();
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!busy) form.requestSubmit();
  });
  element("reset").addEventListener("click", () => {
    messages = [];
    chat.replaceChildren();
    say(ready);
  });
  bar.hidden = true;
  message.disabled = send.disabled = element("reset").disabled = false;
  message.focus();
  say(ready);
}

if (globalThis.document) page();
