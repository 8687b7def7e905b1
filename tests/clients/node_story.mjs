// What the node client does with the server: chat, streams, tools, schemas, responses, embeddings, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";

const { URL: baseURL, KEY: apiKey, CHAT: model, EMBED } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const usual = { model, messages, temperature: 0, max_tokens: 16 };

const names = [];
for await (const one of client.models.list()) names.push(one.id);
assert(names.includes(model));

const whole = await client.chat.completions.create(usual);
assert(whole.choices[0].message.content.includes("Paris"));

let text = "";
let usage;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...usual, ...options })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const stream = client.chat.completions.stream(usual);
assert.equal((await stream.finalChatCompletion()).choices[0].message.content, text);

const parameters = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const asked = [{ role: "user", content: "What is the weather in Paris?" }];
const called = await client.chat.completions.create({ ...usual, messages: asked, tools, tool_choice: "required", max_tokens: 60 });
const call = called.choices[0].message.tool_calls[0];
assert(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));

const response_format = { type: "json_schema", json_schema: { name: "answer", schema: parameters, strict: true } };
const formed = await client.chat.completions.create({ ...usual, response_format, max_tokens: 60 });
assert(["Paris", "Rome"].includes(JSON.parse(formed.choices[0].message.content).city));

const first = await client.responses.create({ model, input: "What is the capital of France?", temperature: 0, max_output_tokens: 16 });
assert(first.output_text.includes("Paris"));
const kinds = [];
const going = { model, input: "And of Italy?", previous_response_id: first.id, max_output_tokens: 8, stream: true };
for await (const event of await client.responses.create(going)) kinds.push(event.type);
assert.equal(kinds[0], "response.created");
assert(["response.completed", "response.incomplete"].includes(kinds.at(-1)));

const completion = await client.completions.create({ model, prompt: "The capital of France is", max_tokens: 4, temperature: 0 });
assert(completion.choices[0].text.includes("Paris"));

const vectors = await client.embeddings.create({ model: EMBED, input: ["A cat.", "Stocks."] });
assert.equal(vectors.data[1].embedding.length, 384);

await assert.rejects(client.chat.completions.create({ ...usual, model: "nothing" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...usual, temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(new OpenAI({ baseURL, apiKey: "mw_no", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError);

const cut = await client.chat.completions.create({ ...usual, max_tokens: 500, stream: true });
for await (const _ of cut) break;
console.log(`openai for node ${(await import("openai/version.mjs")).VERSION}`);
