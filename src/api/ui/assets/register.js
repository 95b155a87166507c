// Registering a concept: images chosen or dropped, their captions, a name.

import { call } from "./api.js";
import { $, announce, h, toast } from "./dom.js";
import { clearErrors, fieldError, number, showError } from "./forms.js";

/** The API's own limit: larger uploads would be refused. */
const PICTURES = 10;
const TYPES = ["image/png", "image/jpeg", "image/webp"];

/** Chosen images: `{file, url, item, caption}`. */
let chosen = [];

const form = $("register-form");

function row(picture) {
  const { file } = picture;
  const id = `caption-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
  picture.caption = h("input", { id, autocomplete: "off", maxlength: 200, placeholder: "what else it shows: on the beach" });
  const remove = h("button", { type: "button", class: "quiet small", text: "Remove", "aria-label": `Remove ${file.name}` });
  remove.addEventListener("click", () => drop(picture));
  return h("li", {},
    h("img", { src: picture.url, alt: "" }),
    h("div", {}, h("label", { for: id, text: `Caption of ${file.name} (optional)` }), picture.caption),
    remove);
}

function drop(picture) {
  const at = chosen.indexOf(picture);
  chosen.splice(at, 1);
  URL.revokeObjectURL(picture.url);
  picture.item.remove();
  announce(`${picture.file.name} removed. ${chosen.length} left.`);
  // The focus goes to the neighbour, else it would fall to the top of the page.
  (chosen[Math.min(at, chosen.length - 1)]?.item.querySelector("button") ?? $("pictures")).focus();
}

/** Adds images; reports files that are none, and those beyond the limit. */
function take(files) {
  clearErrors(form);
  const good = [...files].filter((file) => TYPES.includes(file.type));
  const room = PICTURES - chosen.length;
  for (const file of good.slice(0, room)) {
    const picture = { file, url: URL.createObjectURL(file) };
    picture.item = row(picture);
    chosen.push(picture);
    $("chosen").append(picture.item);
  }
  announce(`${chosen.length} images chosen.`);
  if (good.length > room) showError(form, fieldError("images", `At most ${PICTURES} images; ${good.length - room} left out.`));
  else if (good.length < files.length) showError(form, fieldError("images", "Only PNG, JPEG and WebP images can be used."));
}

const kind = () => form.elements.kind.value;

function showKind() {
  const subject = kind() === "subject";
  $("class-field").hidden = !subject;
  for (const { caption } of chosen) caption.placeholder = subject ? "what else it shows: on the beach" : "what it shows: a house on the grass";
}

/** The form as the API takes it. */
function body() {
  if (chosen.length === 0) throw fieldError("images", "Choose at least one image.");
  const data = new FormData();
  data.append("name", form.elements.name.value.trim());
  data.append("kind", kind());
  if (kind() === "subject") data.append("class", form.elements.class.value.trim());
  const description = form.elements.description.value.trim();
  if (description) data.append("description", description);
  for (const name of ["steps", "learning_rate", "seed"]) {
    const value = number(form, name);
    if (value !== undefined) data.append(name, value);
  }
  // Captions are matched by position, so that the empty ones go along.
  const captions = chosen.map(({ caption }) => caption.value.trim());
  if (captions.some(Boolean)) for (const caption of captions) data.append("captions", caption);
  for (const { file } of chosen) data.append("images", file, file.name);
  return data;
}

function empty() {
  form.reset();
  for (const { url } of chosen) URL.revokeObjectURL(url);
  chosen = [];
  $("chosen").replaceChildren();
  showKind();
}

async function submit(event) {
  event.preventDefault();
  clearErrors(form);
  const button = $("register-button");
  button.disabled = true;
  try {
    const concept = await call("POST", "/v1/concepts", { form: body() });
    empty();
    if (concept.duplicate_of) toast(`The same images and settings have made ${concept.duplicate_of.name ?? concept.duplicate_of} already.`);
    location.hash = `#/concepts/${concept.name}`;
  } catch (error) {
    showError(form, error);
  } finally {
    button.disabled = false;
  }
}

/** Wires the form, once. */
export function begin() {
  form.addEventListener("submit", submit);
  form.addEventListener("change", showKind);
  $("pictures").addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = "";
  });
  const zone = $("drop");
  for (const type of ["dragenter", "dragover"]) {
    zone.addEventListener(type, (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
  }
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    take(event.dataTransfer.files);
  });
}

/** Shows the form as it was left. */
export function show() {
  clearErrors(form);
  showKind();
}
