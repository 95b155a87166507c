// One generation on the page: its images appear while they are drawn.

import { call, localPath, send, wait } from "./api.js";
import { actionButton, announce, h } from "./dom.js";
import { plain } from "./forms.js";
import { readEvents } from "./sse.js";
import { ended } from "./training.js";

/** As many unfinished images as the API sends. */
const PARTIALS = 3;
const POLL_SECONDS = 1;

/** The bytes of a base64 text as a blob URL; the page's policy admits no data: images. */
function decoded(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: `image/${format}` }));
}

/** A link that saves an image under a name that says what it is. */
export function downloadLink(image, text = "Download") {
  const href = localPath(image.url);
  const extension = href.split("?")[0].split(".").pop();
  return h("a", { class: "button small", href, download: `coar-${image.seed}-${image.index}.${extension}`, text });
}

const percent = (part) => `${Math.round(100 * part)}%`;

/** An image's place: a moving ground at first, then the rows that are drawn, then the image. */
class Tile {
  #partials = 0;

  constructor(prompt, index, size) {
    this.prompt = prompt;
    this.index = index;
    this.canvas = h("div", { class: "canvas waiting" });
    const [width, height] = (size ?? "").split("x").map(Number);
    if (height) this.canvas.style.aspectRatio = `${width} / ${height}`;
    this.caption = h("figcaption", { text: "waiting" });
    this.element = h("figure", { class: "tile" }, this.canvas, this.caption);
  }

  /** Lays `url` over what is there, row by row, from where the last one ended to where this one does. */
  #lay(url, alt, to) {
    const image = h("img", { alt, class: "arriving" });
    image.style.setProperty("--from", percent(this.#partials / (PARTIALS + 1)));
    image.style.setProperty("--to", percent(to));
    image.addEventListener("load", () => {
      if (url.startsWith("blob:")) URL.revokeObjectURL(url);
      if (to === 1) this.canvas.classList.remove("waiting");
      const tidy = () => {
        while (image.previousSibling) image.previousSibling.remove();
      };
      image.addEventListener("animationend", tidy, { once: true });
      if (matchMedia("(prefers-reduced-motion: reduce)").matches) tidy();
    }, { once: true });
    image.src = url;
    this.canvas.append(image);
  }

  partial(base64, format) {
    // Below the rows that are drawn the API's image is grey.
    this.#lay(decoded(base64, format), "", (this.#partials + 1) / (PARTIALS + 1));
    this.#partials += 1;
    this.caption.textContent = "being drawn";
    this.element.dataset.partials = this.#partials;
  }

  finish(image) {
    if (this.done) return;
    this.done = true;
    const url = image.url ? localPath(image.url) : decoded(image.b64_json, "png");
    this.#lay(url, this.prompt, 1);
    this.caption.textContent = `seed ${image.seed} · image ${image.index}`;
    this.element.dataset.done = "true";
  }

  stop() {
    if (this.done) return;
    this.element.remove();
  }
}

/** Draws one request; `title` is what stands above it. */
export class Drawing {
  #abort = new AbortController();
  #id = null;

  constructor(request, title, finished) {
    this.request = request;
    const count = request.n ?? 1;
    this.first = request.first_index ?? 0;
    this.tiles = Array.from({ length: count }, (_, at) => new Tile(request.prompt, this.first + at, request.size));
    this.bar = h("progress", { "aria-label": "Drawing" });
    this.text = h("span", { text: "sending" });
    this.cancelButton = actionButton("Cancel", () => this.cancel(), { className: "small quiet" });
    this.work = h("div", { class: "stack" }, this.bar, h("div", { class: "state" }, this.text, this.cancelButton));
    this.after = h("div", { class: "row" });
    this.element = h("article", { class: "drawing", "aria-label": title ?? "Drawing" },
      title ? h("h2", { text: title }) : null,
      h("p", { class: "prompt", text: request.prompt }),
      h("div", { class: count === 1 ? "tiles one" : "tiles" }, ...this.tiles.map((tile) => tile.element)),
      this.work, this.after);
    this.finished = finished;
  }

  /** Draws to the end; resolves to the generation. Throws what the API refused. */
  async run() {
    try {
      const generation = await this.#follow();
      this.#end(generation);
      return generation;
    } catch (error) {
      if (this.#abort.signal.aborted) {
        this.#end({ status: "cancelled", images: [] });
        return null;
      }
      this.#end({ status: "failed", images: [], error });
      throw error;
    }
  }

  /** Gives the device back. */
  async cancel() {
    try {
      if (this.#id) await call("POST", `/v1/generations/${this.#id}/cancel`);
      this.#abort.abort();
    } catch (error) {
      // It ended in the meantime: the stream tells how.
      if (error.status !== 409) throw error;
    }
  }

  async #follow() {
    const { signal } = this.#abort;
    const response = await send("POST", "/v1/generations", {
      json: { ...this.request, partial_images: PARTIALS },
      accept: "text/event-stream",
      signal,
    });
    if (!(response.headers.get("Content-Type") ?? "").startsWith("text/event-stream")) return this.#poll(await response.json());
    try {
      for await (const { event, data } of readEvents(response)) {
        const generation = this.#event(event, data);
        if (generation) return generation;
      }
    } catch (error) {
      if (signal.aborted || error.param !== undefined || !this.#id) throw error;
    }
    if (!this.#id) throw new Error("The server broke the stream off.");
    return this.#poll({ id: this.#id });
  }

  /** One event; the generation when it is the last. */
  #event(event, data) {
    const generation = data.generation ?? data;
    const format = this.request.output_format ?? "png";
    const tile = this.tiles[(data.index ?? 0) - this.first];
    if (event === "queued") this.#queued(generation);
    else if (event === "progress") this.#progress(data);
    else if (event === "partial_image") tile?.partial(data.b64_json, format);
    else if (event === "image") tile?.finish(data);
    else if (event === "error") throw Object.assign(new Error(data.error.message), data.error);
    else if (["completed", "failed", "cancelled"].includes(event)) return generation;
    return null;
  }

  #queued(generation) {
    this.#id = generation.id;
    const before = generation.queue_position;
    this.text.textContent = before > 0 ? `waiting, ${before} before it` : "waiting for the device";
  }

  #progress({ done, total }) {
    if (!total) return;
    this.bar.max = total;
    this.bar.value = done;
    this.text.textContent = `drawing, ${Math.floor((100 * done) / total)} %`;
  }

  /** Where there is no stream, or it broke off: asking until the end. */
  async #poll(begun) {
    this.#id = begun.id;
    for (let generation = begun; ; ) {
      if (ended(generation.status)) return generation;
      if (generation.status) {
        if (generation.status === "queued") this.#queued(generation);
        else this.#progress(generation.progress ?? {});
        await wait(POLL_SECONDS, this.#abort.signal);
      }
      generation = await call("GET", `/v1/generations/${this.#id}`, { signal: this.#abort.signal });
    }
  }

  #end(generation) {
    for (const image of generation.images ?? []) this.tiles[image.index - this.first]?.finish(image);
    for (const tile of this.tiles) tile.stop();
    const { status } = generation;
    this.element.dataset.status = status;
    this.bar.hidden = true;
    this.cancelButton.hidden = true;
    const failure = generation.error?.message;
    this.text.textContent = status === "failed" ? plain(failure ?? "The drawing failed.") : status === "cancelled" ? "Cancelled." : "";
    this.text.className = status === "failed" ? "bad" : "";
    this.work.hidden = status === "succeeded";
    announce(status === "succeeded" ? `${this.tiles.length === 1 ? "The image is" : "The images are"} drawn.` : `Drawing: ${this.text.textContent}`);
    if (status === "succeeded") this.after.replaceChildren(...(this.finished?.(generation) ?? []));
  }
}
