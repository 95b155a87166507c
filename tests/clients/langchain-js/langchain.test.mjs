// The image tool of LangChain for JavaScript against a server: COAR_URL, COAR_KEY, COAR_MODEL (a concept's). Images go to COAR_OUT;
// test_langchain_js.py starts this and decodes them.
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { DallEAPIWrapper } from '@langchain/openai';

const { COAR_URL, COAR_KEY, COAR_MODEL, COAR_OUT } = process.env;
const keep = (name, data) => writeFileSync(join(COAR_OUT, name), data);
const connect = (more) => new DallEAPIWrapper({ baseUrl: `${COAR_URL}/v1`, apiKey: COAR_KEY, model: 'coar', size: '80x112', ...more });
const fetched = async (url) => Buffer.from(await (await fetch(url)).arrayBuffer());

test('an address', async () => {
  keep('url.png', await fetched(await connect().invoke('a red car')));
});

test('base64, with a concept', async () => {
  const text = await connect({ model: COAR_MODEL, dallEResponseFormat: 'b64_json' }).invoke('a photo of a cat');
  keep('b64.png', Buffer.from(text, 'base64'));
});

test('two images', async () => {
  const images = await connect({ n: 2, quality: 'hd', style: 'natural', user: 'user-1' }).invoke('a red car');
  assert.equal(images.length, 2);
  for (const [index, image] of images.entries()) keep(`two-${index}.png`, await fetched(image.image_url));
});

test('an error has the message of the server', async () => {
  await assert.rejects(connect({ size: '97x96' }).invoke('a red car'), /400 `size` is 97x96/);
  await assert.rejects(connect({ apiKey: 'wrong' }).invoke('a red car'), /401/);
});
