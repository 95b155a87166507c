// Completion of `<name>` in the prompt: a listbox under the text, for keyboard, pointer and screen reader.

import { announce, h } from "./dom.js";
import { cover, kindText } from "./library.js";
import { complete, matching, openPlaceholder } from "./prompt.js";

const SHOWN = 8;

/** Adds completion to a textarea; `concepts` gives the concepts to choose from. */
export class Completion {
  #found = [];
  #active = -1;
  #place = null;
  #dismissed = false;

  constructor(area, list, concepts) {
    Object.assign(this, { area, list, concepts });
    area.setAttribute("aria-autocomplete", "list");
    area.setAttribute("aria-controls", list.id);
    area.setAttribute("aria-haspopup", "listbox");
    area.addEventListener("input", () => {
      this.#dismissed = false;
      this.update();
    });
    area.addEventListener("click", () => this.update());
    area.addEventListener("keyup", (event) => {
      if (["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) this.update();
    });
    area.addEventListener("keydown", (event) => this.#key(event));
    area.addEventListener("blur", () => this.close());
    // Before the text loses the focus.
    list.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const option = event.target.closest("[role=option]");
      if (option) this.#choose(Number(option.dataset.at));
    });
  }

  get open() {
    return !this.list.hidden;
  }

  /** Shows what fits the placeholder at the caret, or nothing. */
  update() {
    const { value, selectionStart: caret, selectionEnd: end } = this.area;
    this.#place = caret === end && !this.#dismissed ? openPlaceholder(value, caret) : null;
    this.#found = this.#place ? matching(this.concepts(), this.#place.query).slice(0, SHOWN) : [];
    if (this.#found.length === 0) {
      this.close();
      return;
    }
    this.list.replaceChildren(...this.#found.map((concept, at) => this.#option(concept, at)));
    this.list.hidden = false;
    this.#move(this.#found.findIndex((concept) => concept.status === "ready"));
    announce(`${this.#found.length} concepts. Arrow keys choose, Enter takes.`);
  }

  close() {
    this.list.hidden = true;
    this.#active = -1;
    this.area.removeAttribute("aria-activedescendant");
  }

  #option(concept, at) {
    const ready = concept.status === "ready";
    return h("li", { role: "option", id: `${this.list.id}-${at}`, "data-at": at, "aria-selected": "false", "aria-disabled": ready ? null : "true" },
      cover(concept, "thumb"),
      h("span", { class: "name", text: concept.name }),
      h("small", { text: ready ? kindText(concept) : concept.status }));
  }

  #move(to) {
    this.#active = to;
    [...this.list.children].forEach((option, at) => option.setAttribute("aria-selected", at === to ? "true" : "false"));
    const option = this.list.children[to];
    if (!option) return;
    this.area.setAttribute("aria-activedescendant", option.id);
    option.scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    if (!this.open || event.isComposing) return;
    const count = this.#found.length;
    const moves = { ArrowDown: (this.#active + 1) % count, ArrowUp: (this.#active - 1 + count) % count };
    if (event.key in moves) this.#move(moves[event.key]);
    else if ((event.key === "Enter" && !event.ctrlKey && !event.metaKey) || (event.key === "Tab" && !event.shiftKey)) {
      if (!this.#choose(this.#active)) return;
    } else if (event.key === "Escape") {
      this.#dismissed = true;
      this.close();
    } else return;
    event.preventDefault();
  }

  /** Writes the concept into the text; false when it cannot be used yet. */
  #choose(at) {
    const concept = this.#found[at];
    if (concept?.status !== "ready") return false;
    this.write(concept, this.#place.start, this.area.selectionEnd);
    return true;
  }

  /** Writes `concept` in place of `start..end`. */
  write(concept, start, end) {
    const { text, caret } = complete(this.area.value, start, end, concept);
    this.area.value = text;
    this.area.focus();
    this.area.setSelectionRange(caret, caret);
    this.close();
    announce(`${concept.name} is in the prompt.`);
  }
}
