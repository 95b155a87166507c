// Writing a prompt, setting what can be set, drawing, comparing.

import { call } from "./api.js";
import { Completion } from "./completion.js";
import { $, actionButton, h, toast } from "./dom.js";
import { Drawing, downloadLink } from "./drawing.js";
import { clearErrors, fieldError, number, showError } from "./forms.js";
import { allConcepts } from "./library.js";
import { conceptNames, withoutConcepts } from "./prompt.js";
import { settingsOf } from "./settings.js";

const CHIPS = 12;
/** Numbers that are left out when they are empty, so that the model's own values hold. */
const NUMBERS = ["n", "seed", "first_index", "guidance_scale", "temperature", "top_k"];

const form = $("create-form");
const area = $("prompt");
let concepts = [];
let completion = null;
/** Whether the focus goes to the prompt when the view is shown next. */
let toPrompt = false;

async function loadConcepts() {
  concepts = await allConcepts();
  const ready = concepts.filter((concept) => concept.status === "ready").slice(0, CHIPS);
  $("prompt-concepts").replaceChildren(...ready.map((concept) =>
    h("button", {
      type: "button", class: "chip", text: `<${concept.name}>`, "aria-label": `Put <${concept.name}> into the prompt`,
      onclick: () => completion.write(concept, area.selectionStart, area.selectionEnd),
    })));
  const hint = $("no-concepts");
  if (hint) hint.hidden = concepts.length > 0;
  if (document.activeElement === area) completion.update();
}

async function loadSizes() {
  const { data } = await call("GET", "/v1/models");
  const sizes = data.find((model) => model.sizes)?.sizes ?? [];
  form.elements.size.append(...sizes.map((size) => h("option", { value: size, text: size.replace("x", " × ") })));
}

/** The request as the API takes it. */
function request() {
  const prompt = area.value.trim();
  if (!prompt) throw fieldError("prompt", "Write what to draw.");
  const body = { prompt };
  for (const name of NUMBERS) {
    const value = number(form, name);
    if (value !== undefined) body[name] = value;
  }
  if (form.elements.size.value) body.size = form.elements.size.value;
  return body;
}

/** What can be done with a finished drawing. */
function after(generation) {
  const again = (label, options) =>
    actionButton(label, () => use(settingsOf(generation, options)), { className: "small" });
  const one = generation.images.length === 1;
  const downloads = generation.images.map((image) => downloadLink(image, one ? "Download" : `Download ${image.index}`));
  return [again("Again with a new seed", { newSeed: true }), again("Again with this seed", {}), ...downloads];
}

/** With and without the concepts, side by side, from one seed. */
function comparison(body) {
  const names = conceptNames(body.prompt);
  const used = concepts.filter((concept) => names.includes(concept.name));
  if (used.length === 0) throw fieldError("prompt", "To compare, the prompt needs a concept: type < and choose one.");
  const seed = body.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const title = used.map((concept) => `<${concept.name}>`).join(" and ");
  return [
    new Drawing({ ...body, seed }, `With ${title}`, after),
    new Drawing({ ...body, seed, prompt: withoutConcepts(body.prompt, used) }, "Without", after),
  ];
}

async function submit(event) {
  event?.preventDefault();
  clearErrors(form);
  completion.close();
  try {
    const body = request();
    const drawings = form.elements.compare.checked ? comparison(body) : [new Drawing(body, null, after)];
    await run(drawings);
  } catch (error) {
    showError(form, error);
  }
}

async function run(drawings) {
  const box = h("div", { class: drawings.length > 1 ? "pair" : "" }, ...drawings.map((drawing) => drawing.element));
  $("stage").querySelector(".empty")?.remove();
  $("stage").prepend(box);
  // Beside a form on a wide screen the images are in sight; on a phone they are below it.
  box.scrollIntoView({ block: "nearest", behavior: "smooth" });
  const results = await Promise.allSettled(drawings.map((drawing) => drawing.run()));
  const refused = results.find((result) => result.status === "rejected");
  if (!refused) return;
  if (results.every((result) => result.status === "rejected")) box.remove();
  throw refused.reason;
}

function setSettings(settings) {
  for (const name of NUMBERS) form.elements[name].value = settings[name] ?? "";
  form.elements.size.value = settings.size ?? "";
}

/** Loads settings into the form: `{prompt, n, size, seed, …}`; what is absent is the model's own. */
export function use(settings) {
  clearErrors(form);
  area.value = settings.prompt ?? "";
  setSettings(settings);
  form.elements.compare.checked = Boolean(settings.compare);
  form.querySelector(".settings").open = true;
  toast("The settings are in the form.");
  if (location.hash.startsWith("#/create")) area.focus();
  else {
    toPrompt = true;
    location.hash = "#/create";
  }
}

/** Wires the form, once. */
export function begin() {
  completion = new Completion(area, $("prompt-options"), () => concepts);
  form.addEventListener("submit", submit);
  $("settings-reset").addEventListener("click", () => setSettings({}));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  });
  area.addEventListener("focus", () => loadConcepts().catch(() => {}));
}

/** Shows the form; `concept` is written into an empty prompt. */
export async function show(query) {
  if (toPrompt) area.focus();
  toPrompt = false;
  if (form.elements.size.length === 1) await loadSizes();
  await loadConcepts();
  const wanted = concepts.find((concept) => concept.name === query.get("concept"));
  if (!wanted || conceptNames(area.value).includes(wanted.name)) return;
  if (area.value.trim() === "") area.value = wanted.kind === "style" ? "a picture " : "a photo of ";
  completion.write(wanted, area.value.length, area.value.length);
}
