// Reads {folder, dtype, prompts, n, page, chats, context} from stdin; prints what transformers.js
// and the page's own code make of them.
import fs from "node:fs";
import * as transformers from "@huggingface/transformers";

const { folder, dtype, prompts, n, page, chats, settings } = JSON.parse(fs.readFileSync(0));
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = transformers;
Object.assign(env, { allowRemoteModels: false, localModelPath: "/" });
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const { generate, promptIds, sample } = await import(
  "data:text/javascript;base64," + fs.readFileSync(page).toString("base64")
);

const model = prompts.length ? await AutoModelForCausalLM.from_pretrained(folder, { dtype }) : null;
const greedy = [];
const paged = [];
const unwanted = [];
for (const prompt of prompts) {
  const shape = [1, prompt.length];
  const output = await model.generate({
    input_ids: new Tensor("int64", BigInt64Array.from(prompt, BigInt), shape),
    attention_mask: new Tensor("int64", BigInt64Array.from(prompt, () => 1n), shape),
    max_new_tokens: n,
    do_sample: false,
    eos_token_id: -1,
  });
  greedy.push(Array.from(output.data, Number).slice(prompt.length));
  const ids = [];
  const options = { context: settings.context, maxNewTokens: n, stop: [], temperature: 0 };
  for await (const token of generate(transformers, model, prompt, options)) ids.push(token);
  paged.push(ids);
  const given_up = { ...options, stopped: () => true };
  for await (const token of generate(transformers, model, prompt, given_up)) unwanted.push(token);
}
const encoded = chats.map((chat) => {
  try {
    return promptIds(tokenizer, chat, settings, 8);
  } catch (error) {
    return error.message;
  }
});
const logits = Float32Array.from([0, 3, 1, 2.9, -2]);
const counts = [0, 0, 0, 0, 0];
for (let i = 0; i < 20000; i++) counts[sample(logits, { temperature: 1, topP: 0.9 })]++;
const rendered = chats.map((chat) => {
  const options = { add_generation_prompt: true, return_tensor: false, return_dict: false };
  return tokenizer.apply_chat_template(chat, options);
});
console.log(JSON.stringify({ rendered, greedy, paged, unwanted, encoded, counts }));
