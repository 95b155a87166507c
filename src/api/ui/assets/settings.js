// A generation's settings: as text, and back into the form. No page in here: tested with node.

const NAMES = { size: "Size", seed: "Seed", n: "Images", guidance_scale: "Guidance", temperature: "Temperature", top_k: "Top-k" };

/** The settings of a generation, to be drawn again; with `index` one of its images alone. */
export function settingsOf(generation, { index = null, newSeed = false, compare = false } = {}) {
  const { n, size, seed, first_index: first, guidance_scale, temperature, top_k } = generation.request ?? {};
  const settings = { prompt: generation.prompt, n, size, seed, guidance_scale, temperature, top_k };
  if (first) settings.first_index = first;
  if (index !== null) Object.assign(settings, { n: 1, first_index: index || undefined });
  if (newSeed) Object.assign(settings, { seed: undefined, first_index: undefined });
  if (compare) settings.compare = true;
  return settings;
}

/** Pairs of a name and a text, for people. */
export function described(generation) {
  const request = generation.request ?? {};
  const pairs = Object.entries(NAMES).filter(([name]) => request[name] !== undefined && request[name] !== null);
  return pairs.map(([name, label]) => [label, String(request[name])]);
}
