// Watching a training: its events, or polling where there is no stream; and what it looks like.

import { ApiError, call, send, wait } from "./api.js";
import { curveElement, drawCurve } from "./chart.js";
import { duration } from "./curve.js";
import { actionButton, announce, h } from "./dom.js";
import { showPicture } from "./library.js";
import { readEvents } from "./sse.js";

const POLL_SECONDS = 2;

/** Whether a training or a generation has come to its end. */
export const ended = (status) => ["succeeded", "failed", "cancelled"].includes(status);

/** Reads the event stream until the training ends; false when the stream broke off before. */
async function stream(id, on, signal) {
  const response = await send("GET", `/v1/trainings/${id}/events`, { accept: "text/event-stream", signal });
  for await (const { event, data } of readEvents(response)) {
    if (event === "progress") on.progress(data);
    else if (event === "preview") on.preview(data);
    else if (event === "ended") return true;
  }
  return false;
}

/**
 * Follows a training to its end; resolves to the ended training.
 * @param {{progress: Function, preview: Function}} on
 */
export async function follow(id, on, signal) {
  for (let streams = true; ; ) {
    try {
      if (streams) await stream(id, on, signal);
    } catch (error) {
      if (signal.aborted) throw error;
      // No such route, or a proxy that does not let streams through: from now on by asking.
      if (error instanceof ApiError && error.status >= 400 && error.status < 500) streams = false;
    }
    let training = null;
    try {
      training = await call("GET", `/v1/trainings/${id}`, { signal });
    } catch (error) {
      if (error.status !== 0 && error.status < 500) throw error;
    }
    if (training) {
      if (ended(training.status)) return training;
      on.progress(training.progress, training.status);
      for (const preview of training.previews ?? []) on.preview(preview);
    }
    await wait(POLL_SECONDS, signal);
  }
}

const STATUS = { queued: "Waiting for its turn", running: "Training", succeeded: "Trained", failed: "Failed", cancelled: "Cancelled" };

/** A training on the page: bar, time left, curve, previews. */
export class TrainingPanel {
  #losses = [];
  #previews = new Set();
  #told = -1;
  #total = 0;

  constructor(training) {
    this.training = training;
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Training" });
    this.state = h("span");
    this.eta = h("span");
    this.curve = curveElement();
    this.previews = h("div", { class: "pictures" });
    this.previewBox = h("div", { class: "stack", hidden: true }, h("h3", { text: "On the way" }), this.previews);
    this.problem = h("p", { class: "alert", role: "alert", hidden: true });
    this.buttons = h("div", { class: "row" });
    this.element = h("section", { class: "card stack", "aria-label": "Training" },
      h("h2", { text: "Training" }), this.problem,
      h("div", { class: "stack" }, this.bar, h("p", { class: "state" }, this.state, this.eta)),
      this.curve, this.previewBox, this.buttons);
    this.show(training);
    new ResizeObserver(() => drawCurve(this.curve, this.#losses, this.#total)).observe(this.curve);
  }

  /** Shows a whole training, as the API tells it. */
  show(training) {
    this.training = training;
    for (const { step, total } of training.losses ?? training.report?.losses ?? []) this.#losses.push({ step, loss: total });
    this.progress(training.progress, training.status);
    for (const preview of training.previews ?? []) this.preview(preview);
    const problem = training.error && (training.error.message ?? training.error);
    this.problem.hidden = !problem;
    this.problem.textContent = problem || "";
  }

  progress({ step, total_steps: total, loss, eta_seconds: eta }, status = "running") {
    this.bar.max = Math.max(total, 1);
    this.bar.value = status === "succeeded" ? this.bar.max : step;
    this.state.textContent = `${STATUS[status]}${total ? `, step ${step} of ${total}` : ""}`;
    this.eta.textContent = ended(status) || eta === null || eta === undefined ? "" : `about ${duration(eta)} left`;
    if (loss !== null && loss !== undefined && step > 0) this.#losses.push({ step, loss });
    this.#total = total;
    drawCurve(this.curve, this.#losses, total);
    this.#tell(status, step, total);
  }

  /** Screen readers hear a quarter at a time, not every step. */
  #tell(status, step, total) {
    if (status !== "running" || !total) return;
    const quarter = Math.floor((4 * step) / total);
    if (quarter > this.#told) announce(`Training: step ${step} of ${total}. ${this.eta.textContent}`);
    this.#told = Math.max(quarter, this.#told);
  }

  async preview({ step, url }) {
    if (this.#previews.has(url)) return;
    this.#previews.add(url);
    const image = h("img", { alt: `Preview at step ${step}` });
    const figure = h("figure", {}, image, h("figcaption", { text: `step ${step}` }));
    this.previews.append(figure);
    this.previewBox.hidden = false;
    try {
      await showPicture(image, url);
    } catch {
      figure.remove();
      this.previewBox.hidden = this.previews.childElementCount === 0;
    }
  }

  /** The actions that fit the status; `changed` is called when one of them has done something. */
  actions(changed) {
    const act = (label, path, className) =>
      actionButton(label, async () => changed(await call("POST", path)), { className: `small ${className}` });
    const { id, status } = this.training;
    this.buttons.replaceChildren(
      ...(ended(status) ? [] : [act("Cancel the training", `/v1/trainings/${id}/cancel`, "danger")]),
      ...(["failed", "cancelled"].includes(status) ? [act("Try again", `/v1/trainings/${id}/retry`, "primary")] : []),
    );
    this.buttons.hidden = this.buttons.childElementCount === 0;
  }
}
