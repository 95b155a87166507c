// OpenAI's JavaScript package against a server: COAR_URL, COAR_KEY, COAR_MODEL (a concept's). Images go to COAR_OUT as b64-*.png, url-*.png
// and partial-*.png; test_openai_js.py starts this and decodes them.
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import OpenAI, { toFile } from 'openai';

const { COAR_URL, COAR_KEY, COAR_MODEL, COAR_OUT } = process.env;
const connect = (apiKey) => new OpenAI({ baseURL: `${COAR_URL}/v1`, apiKey, maxRetries: 0 });
const client = connect(COAR_KEY);
const keep = (name, data) => writeFileSync(join(COAR_OUT, name), data);
const draw = (more) => client.images.generate({ model: 'coar', prompt: 'a red car', size: '80x112', ...more });

test('the model list contains the base model and the concept', async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.ok(ids.includes('coar') && ids.includes(COAR_MODEL), ids.join());
  assert.equal((await client.models.retrieve(COAR_MODEL)).id, COAR_MODEL);
});

test('b64_json, two images', async () => {
  const answer = await draw({ n: 2, response_format: 'b64_json' });
  assert.equal(answer.data.length, 2);
  assert.equal(answer.size, '80x112');
  assert.ok(answer.usage.total_tokens > 144);
  answer.data.forEach((image, index) => {
    assert.equal(image.url, undefined);
    keep(`b64-${index}.png`, Buffer.from(image.b64_json, 'base64'));
  });
});

test('url, two images', async () => {
  const answer = await draw({ n: 2, response_format: 'url' });
  assert.equal(answer.data.length, 2);
  for (const [index, image] of answer.data.entries()) {
    assert.equal(image.b64_json, undefined);
    const file = await fetch(image.url);
    assert.equal(file.headers.get('content-type'), 'image/png');
    keep(`url-${index}.png`, Buffer.from(await file.arrayBuffer()));
  }
});

test('a concept, and a field that the package does not know', async () => {
  const first = await draw({ model: COAR_MODEL, prompt: 'a photo of a cat', seed: 7 });
  const again = await draw({ model: COAR_MODEL, prompt: 'a photo of a cat', seed: 7 });
  assert.equal(first.concepts[0].name, COAR_MODEL.split(':')[1]);
  assert.equal(first.data[0].seed, 7);
  assert.equal(first.data[0].b64_json, again.data[0].b64_json);
});

test('a stream with partial images', async () => {
  const kinds = [];
  for await (const event of await draw({ stream: true, partial_images: 2 })) {
    keep(`partial-${kinds.length}.png`, Buffer.from(event.b64_json, 'base64'));
    kinds.push(event.type);
  }
  const partial = 'image_generation.partial_image';
  assert.deepEqual(kinds, [partial, partial, 'image_generation.completed']);
});

test('errors have the types of the package and the message of the server', async () => {
  await assert.rejects(draw({ n: 11 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.match(error.message, /`n` is 11; expected 1 to 10/);
    assert.deepEqual([error.param, error.code, error.type], ['n', 'invalid_value', 'invalid_request_error']);
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(draw({ model: 'gpt-image-1' }), (error) => error instanceof OpenAI.NotFoundError && error.code === 'model_not_found');
  const stranger = connect('wrong').images.generate({ model: 'coar', prompt: 'a cat' });
  await assert.rejects(stranger, (error) => error instanceof OpenAI.AuthenticationError && error.code === 'invalid_api_key');
  const image = await toFile(Buffer.from('no image'), 'cat.png', { type: 'image/png' });
  const edit = client.images.edit({ model: 'coar', image, prompt: 'a hat' });
  await assert.rejects(edit, (error) => error instanceof OpenAI.BadRequestError && error.code === 'unsupported_endpoint');
});
