// Talking to the server: JSON, event streams, the key. Knows nothing about the page.

const KEY = "kveraser.key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Keep a key for as long as this tab is open. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function send(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (reply.ok) return reply;
  const error = await reply.json().catch(() => null);
  throw new ApiError(reply.status, error?.error?.message ?? `the server answered ${reply.status}`);
}

/** The JSON that a request is answered with. */
export const call = async (method, path, body, signal) => (await send(method, path, body, signal)).json();

/** The server-sent events that a request is answered with. */
export async function* events(path, body, signal) {
  const reader = (await send("POST", path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "the server went away");
    const lines = (waiting + value).split("\n\n");
    waiting = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(0, event.error.message);
      yield event;
    }
  }
}
