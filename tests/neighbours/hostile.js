// Run in pages that are not the server's own: one attempt to change something, and one to read. `how` names the way.

(() => {
  const picture = (image) => new File([Uint8Array.from(atob(image), (c) => c.charCodeAt(0))], "1.png", { type: "image/png" });

  const body = (how, { json, fields, image }) => {
    if (how.endsWith("json") || how.endsWith("text")) return json;
    if (how.endsWith("untyped")) return new Blob([json]);
    if (how.endsWith("urlencoded")) return new URLSearchParams(fields);
    if (how.endsWith("multipart")) {
      const form = new FormData();
      for (const [name, value] of Object.entries(fields)) form.append(name, value);
      form.append("images", picture(image));
      return form;
    }
    return undefined;
  };

  const submit = (url, how, { json, fields, image }) =>
    new Promise((resolve) => {
      const frame = document.createElement("iframe");
      frame.name = `frame-${Math.random()}`;
      const form = document.createElement("form");
      Object.assign(form, { action: url, method: "post", target: frame.name });
      form.enctype = { "form urlencoded": "application/x-www-form-urlencoded", "form multipart": "multipart/form-data" }[how] ?? "text/plain";
      // A name and a value with a `=` in between make JSON of a text form.
      const [before, after] = [json.slice(0, -1) + (json === "{}" ? "" : ",") + '"metadata":{"a":"', '"}}'];
      for (const [name, value] of how === "form text" ? [[before, after]] : Object.entries(fields)) {
        const field = document.createElement("input");
        Object.assign(field, { type: "hidden", name, value });
        form.append(field);
      }
      if (how === "form multipart") {
        const chosen = new DataTransfer();
        chosen.items.add(picture(image));
        const field = document.createElement("input");
        Object.assign(field, { type: "file", name: "images", files: chosen.files });
        form.append(field);
      }
      document.body.append(frame, form);
      form.submit();
      frame.addEventListener("load", () => resolve("sent"));
      setTimeout(() => resolve("sent"), 1500);
    });

  const changing = async ([url, method, how, given]) => {
    if (how.startsWith("form")) return submit(url, how, given);
    if (how.startsWith("beacon")) return String(navigator.sendBeacon(url, body(how, given)));
    const readable = how === "fetch json" || method !== "POST";
    const headers = how === "fetch json" ? { "Content-Type": "application/json" } : {};
    try {
      const answer = await fetch(url, { method, body: body(how, given), headers, mode: readable ? "cors" : "no-cors" });
      return `sent ${answer.status}`;
    } catch (error) {
      return `failed ${error}`;
    }
  };

  const within = (promise) => Promise.race([promise, new Promise((resolve) => setTimeout(() => resolve("nothing"), 1500))]);
  const element = (tag, url, event) =>
    within(
      new Promise((resolve) => {
        const made = document.createElement(tag);
        made.addEventListener(event, () => resolve("loaded"));
        made.addEventListener("error", () => resolve("error"));
        made.src = url;
        document.body.append(made);
      }),
    );
  const opened = (made) =>
    within(
      new Promise((resolve) => {
        made.addEventListener("open", () => resolve("open"));
        made.addEventListener("message", () => resolve("open"));
        made.addEventListener("error", () => resolve("error"));
      }),
    ).finally(() => made.close());

  const reading = async ([url, how]) => {
    if (how === "img") return element("img", url, "load");
    if (how === "script") return element("script", url, "load");
    if (how === "EventSource") return opened(new EventSource(url));
    if (how === "WebSocket") return opened(new WebSocket(url.replace("http", "ws")));
    try {
      const answer = await fetch(url);
      const text = await answer.text();
      return answer.ok ? `read ${text.length} bytes` : `refused ${answer.status}`;
    } catch (error) {
      return "error";
    }
  };

  window.attempt = { changing, reading };
})();
