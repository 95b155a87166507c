// Forms: errors of the API beside the field that they name.

const wrapper = (form, param) => form.querySelector(`[data-param="${CSS.escape(param)}"]`);

/** Takes all errors away. */
export function clearErrors(form) {
  for (const invalid of form.querySelectorAll("[aria-invalid]")) invalid.removeAttribute("aria-invalid");
  for (const text of form.querySelectorAll(".field-error")) text.textContent = "";
  const alert = form.querySelector(".alert");
  alert.hidden = true;
  alert.textContent = "";
}

/** Shows one error: beside its field and with the focus there, or above the form. */
export function showError(form, error) {
  const message = plain(error.message);
  const field = error.param && wrapper(form, error.param.replace(/\[.*$/, ""));
  if (!field) {
    const alert = form.querySelector(".alert");
    alert.textContent = message;
    alert.hidden = false;
    return;
  }
  const details = field.closest("details");
  if (details) details.open = true;
  field.querySelector(".field-error").textContent = message;
  const control = field.querySelector("input, select, textarea") ?? field;
  control.setAttribute("aria-invalid", "true");
  control.focus();
}

/** An error of this page's own, in the shape of the API's. */
export const fieldError = (param, message) => Object.assign(new Error(message), { param });

/** The API quotes names with backticks. */
export const plain = (message) => message.replaceAll("`", "");

/** The number in a field, or undefined when it is empty. */
export function number(form, name) {
  const input = form.elements[name];
  if (input.validity.badInput) throw fieldError(name, "Expected a number.");
  return input.value.trim() === "" ? undefined : Number(input.value);
}
