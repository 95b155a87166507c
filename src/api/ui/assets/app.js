// Starts the page: which view is shown is in the address, behind the #.

import { listen } from "./api.js";
import * as concept from "./concept.js";
import * as concepts from "./concepts.js";
import * as create from "./create.js";
import { $, toast } from "./dom.js";
import * as gallery from "./gallery.js";
import * as keys from "./key.js";
import * as register from "./register.js";
import * as theme from "./theme.js";

/** What is under way in the view that is shown; leaving it ends that. Drawings go on: they belong to the page. */
let leaving = new AbortController();
let shown = null;

/** The view, its section in the navigation, and how it fills itself. */
function route() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const [, section, name] = path.split("/").map(decodeURIComponent);
  const parameters = new URLSearchParams(query);
  const { signal } = leaving;
  if (section === "concepts" && name === "new") return ["register", "concepts", () => register.show()];
  if (section === "concepts" && name) return ["concept", "concepts", () => concept.show(name, signal)];
  if (section === "concepts") return ["concepts", "concepts", () => concepts.show(signal)];
  if (section === "gallery") return ["gallery", "gallery", () => gallery.show(signal)];
  return ["create", "create", () => create.show(parameters)];
}

async function navigate() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [view, section, fill] = route();
  for (const element of document.querySelectorAll(".view")) element.hidden = element.id !== `view-${view}`;
  for (const link of document.querySelectorAll(".sections a")) {
    if (link.hash === `#/${section}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = document.querySelector(`#view-${view} h1`);
  // Not on the first view: there the browser's own start is right.
  if (shown !== null && !document.querySelector(`#view-${view}`).contains(document.activeElement)) {
    title.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  shown = view;
  try {
    await fill();
  } catch (error) {
    if (!signal.aborted) toast(error.message);
  }
  if (!signal.aborted) document.title = `${title.textContent} · coar Studio`;
}

function loading(now) {
  const banner = $("banner");
  if (banner.hidden !== now) return;
  banner.hidden = !now;
  banner.textContent = now ? "The server is loading the model. The page continues when it is ready." : "";
}

theme.begin();
listen({ ask: keys.ask, loading });
keys.begin(navigate);
register.begin();
create.begin();
addEventListener("hashchange", navigate);
navigate();
