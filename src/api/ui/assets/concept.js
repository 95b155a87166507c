// One concept: its training, images, versions, and what can be done with it.

import { blobUrl, call } from "./api.js";
import { $, actionButton, announce, confirmed, h, toast } from "./dom.js";
import { clearErrors, number, showError } from "./forms.js";
import { badge, conceptPath, forgetCover, kindText, showPicture } from "./library.js";
import { TrainingPanel, ended, follow } from "./training.js";

const day = (seconds) => new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function showFacts(concept) {
  $("concept-title").textContent = concept.name;
  const facts = [badge(concept), h("span", { text: kindText(concept) })];
  if (concept.version?.number) facts.push(h("span", { text: `version ${concept.version.number}` }));
  if (concept.description) facts.push(h("span", { text: concept.description }));
  $("concept-facts").replaceChildren(...facts);
}

function references(concept) {
  const pictures = h("div", { class: "pictures" });
  for (let index = 0; index < concept.images; index += 1) {
    const image = h("img", { alt: `Reference image ${index + 1}` });
    showPicture(image, conceptPath(concept.id, `/images/${index}`)).catch(() => image.remove());
    pictures.append(image);
  }
  return h("section", { class: "card stack", "aria-label": "Reference images" }, h("h2", { text: "Reference images" }),
    concept.images ? pictures : h("p", { class: "hint", text: "This concept was imported: it has no images here." }));
}

/** The versions, and going back to one of them. */
async function versions(concept, changed, signal) {
  const { data } = await call("GET", conceptPath(concept.id, "/versions"), { signal });
  const list = h("ol", { class: "versions", reversed: true });
  for (const version of data) {
    const current = version.number === concept.version?.number;
    const use = actionButton("Use this version", async () => {
      await call("PATCH", conceptPath(concept.id), { json: { version: version.number } });
      toast(`${concept.name} is now version ${version.number}.`);
      await changed();
    }, { name: `Use this version: ${version.number}` });
    list.append(h("li", { "aria-current": current ? "true" : null },
      h("div", {}, h("b", { text: `Version ${version.number}` }), h("p", { class: "meta", text: day(version.created_at) })),
      current ? h("span", { class: "badge ready", text: "In use" }) : use));
  }
  return h("section", { class: "card stack", "aria-label": "Versions" }, h("h2", { text: "Versions" }),
    data.length > 0 ? list : h("p", { class: "hint", text: "Version 1 appears when the training ends." }));
}

function field(label, name, attributes) {
  const id = `concept-${name}`;
  return h("div", { class: "field", "data-param": name },
    h("label", { for: id, text: label }),
    h("input", { id, name, autocomplete: "off", "aria-describedby": `${id}-error`, ...attributes }),
    h("p", { class: "field-error", id: `${id}-error` }));
}

/** A small form with errors beside its fields. */
function formOf(title, fields, label, submit) {
  const button = h("button", { class: "small", text: label });
  const form = h("form", { class: "card stack", novalidate: true, "aria-label": title },
    h("h2", { text: title }), h("p", { class: "alert", role: "alert", hidden: true }), ...fields, h("div", { class: "row" }, button));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearErrors(form);
    button.disabled = true;
    try {
      await submit(form);
    } catch (error) {
      showError(form, error);
    } finally {
      button.disabled = false;
    }
  });
  return form;
}

function about(concept, changed) {
  const fields = [
    field("Name", "name", { value: concept.name, maxlength: 63, spellcheck: "false" }),
    field("Description", "description", { value: concept.description ?? "" }),
  ];
  return formOf("Name and description", fields, "Save", async (form) => {
    const name = form.elements.name.value.trim();
    const description = form.elements.description.value.trim();
    const change = {};
    if (name !== concept.name) change.name = name;
    if (description !== (concept.description ?? "")) change.description = description;
    if (Object.keys(change).length === 0) return;
    const saved = await call("PATCH", conceptPath(concept.id), { json: change });
    toast("Saved.");
    if (saved.name !== concept.name) location.replace(`#/concepts/${saved.name}`);
    else await changed();
  });
}

function retrain(concept, changed) {
  const numeric = { type: "number", min: 0, step: "any", placeholder: "as before" };
  const fields = [h("div", { class: "grid" },
    field("Steps", "steps", { ...numeric, min: 1, step: 1 }), field("Learning rate", "learning_rate", numeric), field("Seed", "seed", { ...numeric, step: 1 }))];
  return formOf("Train a new version", fields, "Train again", async (form) => {
    const settings = {};
    for (const name of ["steps", "learning_rate", "seed"]) {
      const value = number(form, name);
      if (value !== undefined) settings[name] = value;
    }
    await call("POST", conceptPath(concept.id, "/trainings"), { json: settings });
    announce("A new training is queued.");
    await changed();
  });
}

function lastActions(concept) {
  const download = actionButton("Download the concept file", async () => {
    const url = await blobUrl(conceptPath(concept.id, "/weights"));
    h("a", { href: url, download: `${concept.name}.safetensors` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
  download.disabled = concept.status !== "ready";
  const remove = actionButton("Delete", async () => {
    const sure = await confirmed(`Delete ${concept.name}?`, "Its images, versions and trainings are removed for good.");
    if (!sure) return;
    await call("DELETE", conceptPath(concept.id));
    forgetCover(concept);
    toast(`${concept.name} is deleted.`);
    location.hash = "#/concepts";
  }, { className: "small danger", name: `Delete ${concept.name}` });
  const use = h("a", { class: "button small primary", href: `#/create?concept=${encodeURIComponent(concept.name)}`, text: "Draw with it" });
  return h("div", { class: "row" }, concept.status === "ready" ? use : null, download, remove);
}

/** Follows the training of the shown concept; when it ends the page shows what came out. */
async function watch(panel, concept, changed, signal) {
  try {
    const training = await follow(panel.training.id, {
      progress: (progress, status) => panel.progress(progress, status),
      preview: (preview) => panel.preview(preview),
    }, signal);
    announce(training.status === "succeeded" ? `${concept.name} is trained.` : `The training of ${concept.name} has ${training.status}.`);
    await changed();
  } catch (error) {
    if (!signal.aborted) toast(error.message);
  }
}

/** Shows the concept `name`. */
export async function show(name, signal) {
  const body = $("concept-body");
  $("concept-title").textContent = name;
  $("concept-facts").replaceChildren();
  body.replaceChildren();
  const changed = () => !signal.aborted && fill();
  let round = null;

  async function fill() {
    round?.abort();
    round = new AbortController();
    const turn = AbortSignal.any([signal, round.signal]);
    const concept = await call("GET", conceptPath(name), { signal: turn });
    showFacts(concept);
    const parts = [lastActions(concept)];
    let panel = null;
    if (concept.training) {
      panel = new TrainingPanel(await call("GET", `/v1/trainings/${concept.training.id}`, { signal: turn }));
      panel.actions(changed);
      parts.push(panel.element);
    }
    const past = await versions(concept, changed, turn).catch((error) => {
      if (turn.aborted) throw error;
      return null;
    });
    parts.push(h("div", { class: "columns" },
      h("div", { class: "stack wide-gap" }, references(concept), concept.images ? retrain(concept, changed) : null),
      h("div", { class: "stack wide-gap" }, past, about(concept, changed))));
    const inside = body.contains(document.activeElement);
    body.replaceChildren(...parts);
    // What had the focus is gone; it stays near.
    if (inside) $("concept-title").focus();
    if (panel && !ended(panel.training.status)) watch(panel, concept, changed, turn);
  }
  await fill();
}
