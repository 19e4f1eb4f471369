// What a Node program with OpenAI's library does: chat, stream, helper, responses, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const model = "llada";
const messages = [{ role: "user", content: "What is 17 + 25?" }];
const asked = { model, messages, max_tokens: 64, temperature: 0 };

const whole = await client.chat.completions.create(asked);
const text = whole.choices[0].message.content;
assert.match(text, /42/);
assert.equal(whole.choices[0].finish_reason, "stop");

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0].delta.content ?? "";
}
assert.equal(streamed, text);

const helper = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
const final = await helper.finalChatCompletion();
assert.equal(final.choices[0].message.content, text);
assert.deepEqual((await helper.totalUsage()).completion_tokens, whole.usage.completion_tokens);

const own = await client.chat.completions.create({ ...asked, policy: "threshold", threshold: 0.9 });
assert.equal(own.vdiff.decoding.policy, "threshold");

const plain = await client.completions.create({ model, prompt: "The sun", max_tokens: 8 });
assert.ok(plain.choices[0].text.length > 0);

const input = { model, input: "What is 17 + 25?", max_output_tokens: 64, temperature: 0 };
const response = await client.responses.create(input);
assert.equal(response.output_text, text);
const events = client.responses.stream(input);
assert.equal((await events.finalResponse()).output_text, text);

const names = [];
for await (const each of client.models.list()) names.push(each.id);
assert.deepEqual(names, ["llada"]);

await assert.rejects(client.chat.completions.create({ ...asked, model: "nope" }), OpenAI.NotFoundError);
await assert.rejects(
  client.chat.completions.create({ ...asked, temperature: 9 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);

const controller = new AbortController();
const left = await client.chat.completions.create(
  { ...asked, max_tokens: 256, stream: true, ignore_eos: true },
  { signal: controller.signal },
);
for await (const chunk of left) {
  assert.ok(chunk.id);
  controller.abort();
}
