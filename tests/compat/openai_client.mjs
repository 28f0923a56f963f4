// The official `openai` client for Node: every method that a server like ours should answer.

import assert from "node:assert/strict";
import OpenAI, { BadRequestError, NotFoundError } from "openai";

const model = process.env.LLMSERVE_MODEL;
const client = new OpenAI({
  baseURL: `${process.env.LLMSERVE_URL}/v1`, apiKey: "none", maxRetries: 0,
});
const messages = [{ role: "user", content: [{ type: "text", text: "hello" }] }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Bern", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};

async function collect(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

const checks = {
  async models() {
    const { data } = await client.models.list();
    assert.deepEqual(data.map(({ id }) => id), [model]);
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async completions() {
    const whole = await client.completions.create({
      model, prompt: ["Once", "upon"], max_tokens: 6, n: 2, logprobs: 2, seed: 1, echo: true,
    });
    assert.equal(whole.choices.length, 4);
    assert.ok(whole.choices[0].text.startsWith("Once"));
    assert.equal(whole.choices[0].logprobs.token_logprobs[0], null);
    const chunks = await collect(await client.completions.create({
      model, prompt: "Once", max_tokens: 6, seed: 1, stream: true,
      stream_options: { include_usage: true },
    }));
    assert.equal(chunks.at(-1).usage.completion_tokens, 6);
    assert.equal(chunks.at(-2).choices[0].finish_reason, "length");
  },

  async chat() {
    const options = { model, messages, max_completion_tokens: 6, seed: 1 };
    const whole = await client.chat.completions.create({
      ...options, logprobs: true, top_logprobs: 2,
    });
    assert.equal(whole.choices[0].logprobs.content.length, 6);
    const chunks = await collect(await client.chat.completions.create({ ...options, stream: true }));
    const text = chunks.map(({ choices }) => choices[0].delta.content ?? "").join("");
    assert.equal(text, whole.choices[0].message.content);
  },

  async tools() {
    const weather = { type: "function", function: { name: "weather", parameters: schema } };
    const { choices } = await client.chat.completions.create({
      model, messages, tools: [weather], tool_choice: "required", max_tokens: 200,
    });
    assert.equal(choices[0].finish_reason, "tool_calls");
    const [call] = choices[0].message.tool_calls;
    assert.ok(["Bern", "Rome"].includes(JSON.parse(call.function.arguments).city));
  },

  async structured() {
    const { choices } = await client.chat.completions.create({
      model, messages, max_tokens: 200,
      response_format: { type: "json_schema", json_schema: { name: "w", schema } },
    });
    assert.ok(["Bern", "Rome"].includes(JSON.parse(choices[0].message.content).city));
  },

  async embeddings() {
    const { data } = await client.embeddings.create({ model, input: ["Once", "upon a time"] });
    const length = data[0].embedding.reduce((sum, value) => sum + value * value, 0);
    assert.ok(Math.abs(length - 1) < 1e-3);
  },

  async responses() {
    const options = { model, input: "hello", max_output_tokens: 5, temperature: 0 };
    const whole = await client.responses.create(options);
    const events = await collect(await client.responses.create({ ...options, stream: true }));
    const pieces = events.filter(({ type }) => type === "response.output_text.delta");
    assert.equal(pieces.map(({ delta }) => delta).join(""), whole.output_text);
  },

  async errors() {
    const asked = { model, prompt: "x" };
    await assert.rejects(client.completions.create({ ...asked, max_tokens: -1 }), BadRequestError);
    await assert.rejects(client.completions.create({ ...asked, model: "nobody" }), NotFoundError);
  },

  // A client that leaves in the middle of a stream.
  async leaving() {
    const stream = await client.completions.create({
      model, prompt: "Once", max_tokens: 500, stream: true, ignore_eos: true,
    });
    for await (const part of stream) {
      assert.equal(part.choices.length, 1);
      break;
    }
    stream.controller.abort();
    assert.equal((await fetch(`${process.env.LLMSERVE_URL}/health`)).status, 200);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`openai for Node ${process.version}: ${name} ok`);
}
