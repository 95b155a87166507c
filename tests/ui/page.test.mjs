// The page's functions that need no page.

import assert from "node:assert/strict";
import { test } from "node:test";

const assets = new URL("../../src/api/ui/assets/", import.meta.url);
const { complete, conceptNames, matching, openPlaceholder, withoutConcepts } = await load("prompt.js");
const { cleaned, duration, path, scale, smooth, ticks } = await load("curve.js");
const { EventParser } = await load("sse.js");
const { described, settingsOf } = await load("settings.js");

/** The assets are modules for browsers, in a folder without a package.json: node is told by the address that they are. */
async function load(name) {
  const { readFile } = await import("node:fs/promises");
  const text = await readFile(new URL(name, assets), "utf8");
  return import(`data:text/javascript;base64,${Buffer.from(text).toString("base64")}`);
}

const rex = { name: "rex", kind: "subject", class: "cat" };
const ada = { name: "ada", kind: "subject", class: "owl" };
const sepia = { name: "sepia", kind: "style", class: null };

test("a placeholder is open from its bracket to the caret", () => {
  assert.deepEqual(openPlaceholder("a <", 3), { start: 2, query: "" });
  assert.deepEqual(openPlaceholder("a <re b", 5), { start: 2, query: "re" });
  assert.deepEqual(openPlaceholder("<rex> and <s", 12), { start: 10, query: "s" });
  for (const [text, caret] of [["a <rex> ", 8], ["1 < 2", 5], ["a <Re", 5], ["a <-", 4], ["", 0]]) assert.equal(openPlaceholder(text, caret), null, text);
});

test("names are those that the server takes for names", () => {
  assert.deepEqual(conceptNames("a <b photo of <rex> cat, 1 < 2, in <ink-2> style <Not> <rex>"), ["rex", "ink-2"]);
});

test("concepts that begin with the query come first", () => {
  const names = (query) => matching([ada, sepia, rex, { name: "arex" }], query).map((concept) => concept.name);
  assert.deepEqual(names("re"), ["rex", "arex"]);
  assert.deepEqual(names(""), ["ada", "sepia", "rex", "arex"]);
});

test("completion writes the noun and the style's words once", () => {
  const done = (text, concept, tail = "") => complete(text + tail, text.lastIndexOf("<"), text.length, concept);
  assert.deepEqual(done("a photo of <r", rex), { text: "a photo of <rex> cat", caret: 20 });
  assert.equal(done("a <r", rex, " cat here").text, "a <rex> cat here");
  assert.equal(done("a house <s", sepia).text, "a house in <sepia> style");
  assert.equal(done("a house in <s", sepia).text, "a house in <sepia> style");
  assert.equal(done("<s", sepia, " style").text, "<sepia> style");
  assert.equal(done("a<r", rex, "x").text, "a <rex> cat x");
});

test("without its concepts a prompt keeps the nouns", () => {
  const plain = (text) => withoutConcepts(text, [rex, ada, sepia]);
  assert.equal(plain("a photo of <rex> cat on the beach"), "a photo of a cat on the beach");
  assert.equal(plain("a photo of <ada>, asleep"), "a photo of an owl, asleep");
  assert.equal(plain("my <rex> cat and the <ada> owl"), "my cat and the owl");
  assert.equal(plain("a picture of <rex> cat in the snow in <sepia> style"), "a picture of a cat in the snow");
  assert.equal(plain("<sepia> style, a house"), "a house");
  assert.equal(plain("a <foreign> thing"), "a <foreign> thing");
});

test("ticks are round and inside", () => {
  assert.deepEqual(ticks(0, 60, 6), [0, 10, 20, 30, 40, 50, 60]);
  assert.deepEqual(ticks(0, 0.35, 4), [0, 0.1, 0.2, 0.3]);
  assert.deepEqual(ticks(-1, 1, 4), [-1, -0.5, 0, 0.5, 1]);
  assert.deepEqual(ticks(3, 3, 4), [3]);
});

test("the curve's numbers", () => {
  assert.equal(scale(0, 10, 100, 0)(2.5), 75);
  assert.equal(scale(5, 5, 0, 10)(5), 0);
  assert.deepEqual(smooth([1, 2, 6], 1), [1.5, 3, 4]);
  assert.deepEqual(smooth([1, 2, 6], 0), [1, 2, 6]);
  assert.deepEqual(cleaned([{ step: 2, loss: 1 }, { step: 1, loss: 3 }, { step: 2, loss: 2 }, { step: 3, loss: null }, { step: 4, loss: NaN }]), [{ step: 1, loss: 3 }, { step: 2, loss: 2 }]);
  assert.equal(path([[0, 1], [2, 3.25]]), "M0.0 1.0L2.0 3.3");
  assert.equal(duration(59.4), "59 s");
  assert.equal(duration(61), "1 min 1 s");
  assert.equal(duration(3700), "1 h 1 min");
});

test("events are cut alike, wherever the pieces end", () => {
  const text = ": hello\r\n\r\nevent: progress\r\ndata: {\"a\":\r\ndata: 1}\r\n\r\nid: 7\ndata: x\n\nevent: none\n\n";
  const expected = [{ event: "progress", data: "{\"a\":\n1}", id: null }, { event: "message", data: "x", id: "7" }];
  for (let size = 1; size <= text.length; size += 1) {
    const parser = new EventParser();
    const events = [];
    for (let at = 0; at < text.length; at += size) events.push(...parser.push(text.slice(at, at + size)));
    assert.deepEqual(events, expected, `pieces of ${size}`);
  }
});

test("settings come back as they were drawn", () => {
  const generation = { prompt: "a cat", request: { n: 4, size: "96x96", seed: 7, first_index: 2, guidance_scale: 3, temperature: 1, top_k: 0, output_format: "png" } };
  const same = { prompt: "a cat", n: 4, size: "96x96", seed: 7, guidance_scale: 3, temperature: 1, top_k: 0 };
  assert.deepEqual(settingsOf(generation), { ...same, first_index: 2 });
  assert.deepEqual(settingsOf(generation, { index: 3 }), { ...same, n: 1, first_index: 3 });
  assert.deepEqual(settingsOf(generation, { newSeed: true }), { ...same, seed: undefined, first_index: undefined });
  assert.deepEqual(described(generation).map(([name]) => name), ["Size", "Seed", "Images", "Guidance", "Temperature", "Top-k"]);
});
