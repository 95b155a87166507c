// `<name>` in prompts, as the server cuts them. No page in here: tested with node.

const OPEN = /<([a-z0-9][a-z0-9-]*)?$/;
const NAMES = /<([a-z0-9][a-z0-9-]{0,62})>/g;

/** The placeholder being typed at the caret: where it starts, and the letters after `<`; null when there is none. */
export function openPlaceholder(text, caret) {
  const found = OPEN.exec(text.slice(0, caret));
  return found && { start: found.index, query: found[1] ?? "" };
}

/** Distinct names in a prompt, in their order. */
export function conceptNames(prompt) {
  return [...new Set([...prompt.matchAll(NAMES)].map((match) => match[1]))];
}

/** Concepts that a query may mean: those that begin with it, then those that contain it. */
export function matching(concepts, query) {
  const starts = concepts.filter((concept) => concept.name.startsWith(query));
  const contains = concepts.filter((concept) => !concept.name.startsWith(query) && concept.name.includes(query));
  return [...starts, ...contains];
}

/** What a concept reads like in a prompt: a subject before its noun, a style after "in". */
function phrase(concept, before, after) {
  if (concept.kind === "style") {
    const preposition = /(^|\s)in\s*$/.test(before) || before.trim() === "" ? "" : "in ";
    return `${preposition}<${concept.name}>${/^\s*style\b/.test(after) ? "" : " style"}`;
  }
  const noun = concept.class ?? "";
  const follows = noun && after.trimStart().startsWith(noun);
  return `<${concept.name}>${noun && !follows ? ` ${noun}` : ""}`;
}

/** The prompt with `concept` written in place of `start..end`, and where the caret goes. */
export function complete(text, start, end, concept) {
  const before = text.slice(0, start);
  const after = text.slice(end);
  const gap = before === "" || /\s$/.test(before) ? "" : " ";
  const written = gap + phrase(concept, before, after);
  const space = after === "" || /^[\s.,;:!?]/.test(after) ? "" : " ";
  return { text: before + written + space + after, caret: before.length + written.length + space.length };
}

const VOWEL = /^[aeiou]/i;
const ARTICLE = /\b(a|an|the|my|your|his|her|our|their|this|that|one|two|three)\s+$/i;

/** The same prompt without concepts: a subject leaves its class noun, a style leaves nothing. */
export function withoutConcepts(prompt, concepts) {
  let text = prompt;
  for (const { name, kind, class: noun } of concepts) {
    const placeholder = `<${name}>`;
    if (kind === "style") {
      text = text.replaceAll(new RegExp(`,?\\s*\\b(in|in the)\\s+${placeholder}(\\s+style\\b)?`, "g"), "");
      text = text.replaceAll(new RegExp(`${placeholder}(\\s+style\\b)?`, "g"), "");
      continue;
    }
    for (let at = text.indexOf(placeholder); at >= 0; at = text.indexOf(placeholder)) {
      const before = text.slice(0, at);
      let after = text.slice(at + placeholder.length);
      const word = noun ?? "";
      if (word && after.trimStart().startsWith(word)) after = after.trimStart().slice(word.length);
      const article = !word || ARTICLE.test(before) ? "" : VOWEL.test(word) ? "an " : "a ";
      text = `${before}${article}${word}${after}`;
    }
  }
  return text.replaceAll(/\s+/g, " ").replaceAll(/\s+([.,;:!?])/g, "$1").replace(/^[\s.,;:!?]+/, "").trim();
}
