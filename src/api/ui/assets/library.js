// The caller's concepts: asked for, and their first images.

import { blobUrl, call } from "./api.js";
import { h } from "./dom.js";

/** Pages that are read for the completion; more concepts than this are still found by typing their whole name. */
const PAGES = 5;

/** One page of concepts, newest first. */
export const conceptPage = (limit, after, signal) =>
  call("GET", `/v1/concepts?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`, { signal });

/** Concepts for the completion. */
export async function allConcepts() {
  const all = [];
  for (let page = 0, after = null; page < PAGES; page += 1) {
    const { data, has_more: more } = await conceptPage(100, after);
    all.push(...data);
    if (!more) break;
    after = data.at(-1).id;
  }
  return all;
}

/** A concept's address in the API; `rest` begins with a slash. */
export const conceptPath = (name, rest = "") => `/v1/concepts/${encodeURIComponent(name)}${rest}`;

/** Shows an image that needs the key; rejects when it cannot be had. Its memory is given back once it is drawn. */
export async function showPicture(image, path, signal) {
  const url = await blobUrl(path, signal);
  image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  image.src = url;
}

const covers = new Map();

/** A square with the concept's first reference image, or its first letter where there is none. */
export function cover(concept, className) {
  const letter = h("div", { class: className, "aria-hidden": "true", text: concept.name[0].toUpperCase() });
  if (!concept.images) return letter;
  const image = h("img", { class: className, alt: "" });
  let url = covers.get(concept.id);
  if (!url) {
    url = blobUrl(conceptPath(concept.id, "/images/0"));
    covers.set(concept.id, url);
    url.catch(() => covers.delete(concept.id));
  }
  url.then((found) => (image.src = found), () => image.replaceWith(letter));
  return image;
}

/** Gives the memory of a deleted concept's image back. */
export function forgetCover(concept) {
  covers.get(concept.id)?.then(URL.revokeObjectURL, () => {});
  covers.delete(concept.id);
}

const STATUS = { ready: "Ready", training: "Training", failed: "Failed", cancelled: "Cancelled" };

/** The concept's status as a badge. */
export const badge = (concept) =>
  h("span", { class: `badge ${concept.status}`, text: STATUS[concept.status] ?? concept.status });

/** "subject · cat" */
export const kindText = (concept) => (concept.class ? `${concept.kind} · ${concept.class}` : concept.kind);
