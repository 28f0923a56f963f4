// Calls to the server: JSON, and streams of server-sent events.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  const result = { "Content-Type": "application/json" };
  if (key) result.Authorization = `Bearer ${key}`;
  return result;
}

async function refuse(reply) {
  let message = `${reply.status} ${reply.statusText}`;
  try {
    message = (await reply.json()).error.message;
  } catch {
    // not our shape: the status line has to do
  }
  throw new ApiError(reply.status, message);
}

async function get(path, key) {
  const reply = await fetch(path, { headers: headers(key) });
  if (!reply.ok) await refuse(reply);
  return reply;
}

export async function getJson(path, key) {
  return (await get(path, key)).json();
}

export async function getText(path, key) {
  return (await get(path, key)).text();
}

// Yields the JSON of each event until [DONE]; throws an ApiError for one that holds an error.
export async function* stream(path, body, { key, signal }) {
  const reply = await fetch(path, {
    method: "POST",
    headers: headers(key),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!reply.ok) await refuse(reply);
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.code, event.error.message);
    yield event;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice("data: ".length);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
