// What a program with Vercel's AI SDK does, over both of OpenAI's protocols: texts, streams, objects,
// tools. It checks every answer and event against schemas of its own.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = createOpenAI({ baseURL: process.env.BASE_URL, apiKey: "none" });
const asked = "What is 17 + 25?";
const person = z.object({ name: z.string(), age: z.number().int() });
const weather = tool({
  description: "How the weather is.",
  inputSchema: z.object({ city: z.enum(["Rome", "Oslo"]) }),
  execute: async ({ city }) => ({ sunny: city === "Rome" }),
});

for (const model of [provider.chat("llada"), provider.responses("llada")]) {
  const plain = { model, temperature: 0, maxOutputTokens: 64, maxRetries: 0 };
  const whole = await generateText({ ...plain, system: "Be brief.", prompt: asked });
  assert.match(whole.text, /42/);
  assert.equal(whole.finishReason, "stop");
  const errors = [];
  const onError = ({ error }) => errors.push(error);
  const stream = streamText({ ...plain, system: "Be brief.", prompt: asked, onError });
  const pieces = [];
  for await (const piece of stream.textStream) pieces.push(piece);
  assert.deepEqual(errors, []);
  assert.equal(pieces.join(""), whole.text);
  assert.deepEqual(await stream.usage, whole.usage);

  const object = await generateText({
    ...plain,
    prompt: "Extract name and age as JSON: Anna is 34 years old.",
    output: Output.object({ schema: person }),
    tools: { weather },
  });
  assert.equal(object.output.age, 34);

  const calling = streamText({
    ...plain,
    prompt: "How is the weather?",
    tools: { weather },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    stopWhen: stepCountIs(2),
    onError,
  });
  const steps = await calling.steps;
  assert.deepEqual(errors, []);
  assert.equal(steps.length, 2);
  assert.equal(steps[0].finishReason, "tool-calls");
  assert.equal(steps[0].toolResults[0].toolName, "weather");

  const tooLong = generateText({ ...plain, prompt: "a b ".repeat(900) });
  await assert.rejects(tooLong, /maximum context length/);
}
