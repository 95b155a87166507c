// The API key: typed once, kept in sessionStorage, asked for again on 401.

import { key } from "./api.js";
import { $ } from "./dom.js";

function label() {
  $("key-button").textContent = key.get() ? "API key: set" : "API key";
}

/** Opens the dialog; resolves to whether there is a key to try with. */
function open(text) {
  const dialog = $("key-dialog");
  const field = $("key");
  $("key-text").textContent = text;
  $("key-forget").hidden = !key.get();
  field.value = "";
  dialog.returnValue = "cancel";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "save" && field.value.trim() !== "";
      if (given) key.set(field.value.trim());
      if (dialog.returnValue === "forget") key.set(null);
      field.value = "";
      label();
      resolve(given);
    }, { once: true });
  });
}

/** Asks because the server wants a key. */
export const ask = () => open(key.get() ? "The server does not know this key. Kept in this tab alone, until it is closed." : "This server asks for a key. Kept in this tab alone, until it is closed.");

/** Wires the dialog; `changed` is called when there is another key. */
export function begin(changed) {
  label();
  $("key-button").addEventListener("click", async () => {
    const before = key.get();
    await open("Kept in this tab alone, until it is closed. Not needed where the server has no keys.");
    if (key.get() !== before) changed();
  });
  // Enter in the field means the key, not the first button.
  $("key").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    $("key-dialog").close("save");
  });
}
