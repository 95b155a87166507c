// Everything that was drawn, with what made it.

import { call, localPath } from "./api.js";
import { use } from "./create.js";
import { $, actionButton, announce, confirmed, h, toast } from "./dom.js";
import { downloadLink } from "./drawing.js";
import { described, settingsOf } from "./settings.js";
import { ended } from "./training.js";

const PAGE = 24;

const moment = (seconds) => new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

/** An image that asks for a fresh address once, when its signed one has expired. */
function picture(generation, image) {
  const element = h("img", { src: localPath(image.url), alt: generation.prompt, loading: "lazy" });
  element.addEventListener("error", async () => {
    const fresh = await call("GET", `/v1/generations/${generation.id}`).catch(() => null);
    const found = fresh?.images.find((other) => other.id === image.id);
    if (found) element.src = localPath(found.url);
  }, { once: true });
  return element;
}

function facts(generation, image) {
  const concepts = (generation.concepts ?? []).map(({ name, version }) => `${name} (version ${version})`).join(", ");
  const pairs = [["Prompt", generation.prompt], ...described(generation), ["Image", String(image.index)]];
  if (concepts) pairs.push(["Concepts", concepts]);
  pairs.push(["Drawn", moment(generation.finished_at ?? generation.created_at)]);
  return h("dl", { class: "list" }, ...pairs.flatMap(([name, text]) => [h("dt", { text: name }), h("dd", { text })]));
}

/** One image, large, with its settings. */
function view(generation, image) {
  const dialog = $("viewer");
  const again = (label, options) => h("button", {
    type: "button", class: "small", text: label,
    onclick: () => {
      dialog.close();
      use(settingsOf(generation, options));
    },
  });
  const { index } = image;
  const compare = generation.concepts?.length > 0 ? again("Compare with and without", { index, compare: true }) : null;
  $("viewer-body").replaceChildren(h("div", { class: "viewer-split" },
    picture(generation, image),
    h("div", { class: "stack" },
      facts(generation, image),
      h("div", { class: "row" }, again("Again, new seed", { newSeed: true }), again("Again, same seed", { index }), compare, downloadLink(image)))));
  dialog.showModal();
}

function shots(generation) {
  const { images } = generation;
  const buttons = images.map((image) => h("button", {
    type: "button", class: "shot", "aria-label": `Image ${image.index}: ${generation.prompt}`, onclick: () => view(generation, image),
  }, picture(generation, image)));
  return h("div", { class: images.length === 1 ? "shots one" : "shots" }, ...buttons);
}

function state(generation) {
  if (generation.status === "failed") return h("p", { class: "bad", text: generation.error?.message ?? "Failed." });
  if (generation.status === "succeeded") return null;
  const text = { queued: "Waiting", running: "Being drawn", cancelled: "Cancelled" }[generation.status];
  return h("p", { class: "meta", text });
}

function card(generation) {
  const { seed, size, guidance_scale: guidance } = generation.request ?? {};
  const meta = [`seed ${seed}`, size, guidance === undefined ? null : `guidance ${guidance}`].filter(Boolean).join(" · ");
  const remove = actionButton("Delete", async () => {
    if (!(await confirmed("Delete these images?", `“${generation.prompt}” and what was drawn from it are removed for good.`))) return;
    await call("DELETE", `/v1/generations/${generation.id}`);
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    toast("Deleted.");
    (next?.querySelector("button") ?? $("gallery-title")).focus();
    if ($("gallery-list").childElementCount === 0) $("gallery-list").append(nothing());
  }, { className: "small danger", name: `Delete: ${generation.prompt}` });
  const cancel = actionButton("Cancel", async () => {
    item.replaceWith(card(await call("POST", `/v1/generations/${generation.id}/cancel`)));
  }, { name: `Cancel: ${generation.prompt}` });
  const again = actionButton("Again", () => use(settingsOf(generation, { newSeed: true })), { name: `Again with new seed: ${generation.prompt}` });
  const item = h("li", { class: "card generation", "data-id": generation.id },
    generation.images?.length > 0 ? shots(generation) : null,
    h("div", {}, h("p", { class: "prompt", text: generation.prompt }), h("p", { class: "meta", text: meta }), h("p", { class: "meta", text: moment(generation.created_at) })),
    state(generation),
    h("div", { class: "row" }, again, ended(generation.status) ? remove : cancel));
  return item;
}

const nothing = () =>
  h("li", { class: "empty" }, h("p", { text: "Nothing drawn yet." }), h("a", { class: "button primary", href: "#/create", text: "Write a prompt" }));

/** Shows the newest generations. */
export async function show(signal) {
  const list = $("gallery-list");
  const more = $("gallery-more");
  let last = null;
  const load = async (after) => {
    const query = after ? `&after=${encodeURIComponent(after)}` : "";
    const { data, has_more: hasMore } = await call("GET", `/v1/generations?limit=${PAGE}${query}`, { signal });
    const cards = data.map(card);
    if (after) list.append(...cards);
    else list.replaceChildren(...(cards.length > 0 ? cards : [nothing()]));
    last = data.at(-1)?.id;
    more.hidden = !hasMore;
    return data.length;
  };
  more.onclick = () => load(last).then((count) => announce(`${count} more.`), (error) => toast(error.message));
  $("gallery-refresh").onclick = () => load(null).then((count) => announce(`${count} shown.`), (error) => toast(error.message));
  await load(null);
}
