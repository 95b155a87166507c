// The HTTP API: one request function, its errors, and the key.

const KEY = "coar.key";
/** Where the server's paths begin: `/`, or the prefix of a proxy. This file is in `studio/` there. */
const ROOT = new URL("../", import.meta.url).pathname;
/** How often a request is sent again while the server loads its model. */
const PATIENCE = 120;

/** What the server refused, and why; `param` names the field that is wrong. `status` 0: no answer at all. */
export class ApiError extends Error {
  constructor(status, { message, code, param, limit } = {}) {
    super(message ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: code ?? null, param: param ?? null, limit: limit ?? null });
  }
}

let askForKey = async () => false;
let tellLoading = () => {};

/** `ask` is called on 401 and resolves to whether there is a new key; `loading` is called with whether the model is loading. */
export function listen({ ask, loading }) {
  let asking = null;
  askForKey = () => (asking ??= ask().finally(() => (asking = null)));
  tellLoading = loading;
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** A random value for `Idempotency-Key`; randomUUID is missing on plain HTTP from another machine. */
function unique() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return new ApiError(response.status, body?.error);
}

/**
 * Sends a request; the answer when it is 2xx.
 * @param {{json?: any, form?: FormData, accept?: string, prefer?: string, signal?: AbortSignal}} options
 * @throws {ApiError} on every other answer
 */
export async function send(method, path, { json, form, accept, prefer, signal } = {}) {
  const headers = new Headers();
  if (json !== undefined) headers.set("Content-Type", "application/json");
  if (accept) headers.set("Accept", accept);
  if (prefer) headers.set("Prefer", prefer);
  if (method === "POST") headers.set("Idempotency-Key", unique());
  const body = json === undefined ? form : JSON.stringify(json);
  for (let attempt = 0; ; attempt += 1) {
    const used = key.get();
    if (used) headers.set("Authorization", `Bearer ${used}`);
    let response;
    try {
      response = await fetch(ROOT + path.slice(1), { method, headers, body, signal, credentials: "omit" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(0, { code: "unreachable", message: "The server cannot be reached." });
    }
    if (response.ok) {
      tellLoading(false);
      return response;
    }
    const error = await refusal(response);
    if (error.status === 401 && attempt < PATIENCE && (key.get() !== used || (await askForKey()))) continue;
    if (error.code === "loading" && attempt < PATIENCE) {
      tellLoading(true);
      await pause(Math.min(Number(response.headers.get("Retry-After")) || 2, 5), signal);
      continue;
    }
    throw error;
  }
}

/** As `send`, with the answer's JSON. */
export const call = async (method, path, options) => {
  const response = await send(method, path, options);
  return response.status === 204 ? null : response.json();
};

/** A blob URL of something that needs the key. The caller revokes it when the element goes. */
export async function blobUrl(path, signal) {
  const response = await send("GET", serverPath(path), { signal });
  return URL.createObjectURL(await response.blob());
}

/** The server writes full URLs for its own images; behind a proxy their host and prefix may be others. */
function serverPath(url) {
  const { pathname, search } = new URL(url, location.href);
  return pathname.slice(pathname.lastIndexOf("/v1/")) + search;
}

/** The same as this page reaches it. */
export const localPath = (url) => ROOT + serverPath(url).slice(1);

/** Waits, or rejects when `signal` is aborted. */
export const wait = pause;
