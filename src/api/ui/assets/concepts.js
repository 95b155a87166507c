// The list of concepts.

import { wait } from "./api.js";
import { $, h } from "./dom.js";
import { badge, conceptPage, cover, kindText } from "./library.js";

const PAGE = 24;
const REFRESH_SECONDS = 3;

function card(concept) {
  const { step, total_steps: total } = concept.training?.progress ?? {};
  const bar = concept.status === "training" && total
    ? h("progress", { max: total, value: step, "aria-label": `Training of ${concept.name}` })
    : null;
  return h("li", { class: "card concept", "data-name": concept.name },
    cover(concept, "cover"),
    h("div", { class: "text" },
      h("a", { href: `#/concepts/${concept.name}`, text: concept.name }),
      h("p", { class: "facts" }, badge(concept), h("small", { text: kindText(concept) })),
      bar));
}

const nothing = () =>
  h("li", { class: "empty" },
    h("p", { text: "No concepts yet. Show the model a few images of something it should know." }),
    h("a", { class: "button primary", href: "#/concepts/new", text: "Register the first" }));

/** Shows the list, and keeps it fresh while something in it is in training. */
export async function show(signal) {
  const list = $("concept-list");
  const more = $("concepts-more");
  const shown = [];
  const load = async (after) => {
    const { data, has_more: hasMore } = await conceptPage(PAGE, after, signal);
    shown.push(...data);
    list.replaceChildren(...(shown.length > 0 ? shown.map(card) : [nothing()]));
    more.hidden = !hasMore;
  };
  more.onclick = () => load(shown.at(-1).id);
  await load(null);
  keepFresh(list, shown, signal);
}

/** Cards are replaced only where something changed: the focus stays where it is. */
async function keepFresh(list, shown, signal) {
  while (shown.some((concept) => concept.status === "training")) {
    try {
      await wait(REFRESH_SECONDS, signal);
      const { data } = await conceptPage(100, null, signal);
      for (const fresh of data) {
        const at = shown.findIndex((concept) => concept.id === fresh.id);
        if (at < 0 || JSON.stringify(shown[at]) === JSON.stringify(fresh)) continue;
        shown[at] = fresh;
        const old = list.children[at];
        const focused = old.contains(document.activeElement);
        const changed = card(fresh);
        old.replaceWith(changed);
        if (focused) changed.querySelector("a").focus();
      }
    } catch {
      // Left the view, or the server is away: the next visit asks again.
      return;
    }
  }
}
