// Making elements, without innerHTML: nothing that comes from the server is ever read as markup.

/** An element: attributes, `onclick`-like listeners, `class`, `text`; children are elements, texts or nothing. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** The element with this id. */
export const $ = (id) => document.getElementById(id);

/** Tells screen readers something; the page shows it elsewhere. */
export function announce(text) {
  $("live").textContent = text;
}

/** A short note at the lower edge. */
export function toast(text) {
  const note = h("p", { class: "toast", text });
  $("toasts").append(note);
  setTimeout(() => note.remove(), 6000);
}

/** Asks before something that cannot be undone; resolves to whether it shall be done. */
export function confirmed(title, text, action = "Delete") {
  const dialog = $("confirm");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = action;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** A button that cannot be pressed twice while what it started runs; what fails is shown by `failed`. */
export function actionButton(label, action, { className = "small", failed = (error) => toast(error.message), name } = {}) {
  const button = h("button", { type: "button", class: className, text: label, "aria-label": name });
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await action();
    } catch (error) {
      failed(error);
    } finally {
      button.disabled = false;
    }
  });
  return button;
}
