// Light, dark, or as the system has it; kept in this browser.

import { $ } from "./dom.js";

const STORED = "coar.theme";
const ORDER = ["system", "light", "dark"];

function apply(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme-name").textContent = `Theme: ${theme}`;
}

/** Applies the kept theme and wires the button. */
export function begin() {
  let theme = localStorage.getItem(STORED) ?? "system";
  if (!ORDER.includes(theme)) theme = "system";
  apply(theme);
  $("theme-button").addEventListener("click", () => {
    theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
    localStorage.setItem(STORED, theme);
    apply(theme);
  });
}
