// Talks with the server: JSON, and answers as they come. Knows nothing of the page.

const KEY = "lorakit-api-key";

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  const auth = key ? { Authorization: `Bearer ${key}` } : {};
  return { "Content-Type": "application/json", ...auth };
}

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not one of our own errors, such as a proxy's: the status has to do.
  }
  throw new ServerError(response.status, message);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

// Yields the chunks of one streamed answer.
export async function* stream(path, body, signal) {
  const response = await checked(
    await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError(0, "the connection was closed in the middle of the answer");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(500, chunk.error.message);
      yield chunk;
    }
  }
}
