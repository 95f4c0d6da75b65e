// One streamed answer of the ordinary chat route, and what it said of its tokens.

import { ApiError, request } from "../api";

export interface Alternative {
  token: string;
  logprob: number;
}

export interface Token extends Alternative {
  text: string;
  top: Alternative[];
}

export interface Settings {
  system: string;
  prompt: string;
  temperature: number;
  top_p: number;
  max_tokens: number;
  seed: number | null;
  logprobs: boolean;
}

/** An answer as far as it has come. Times in seconds since it was asked for. */
export interface Answer {
  text: string;
  reasoning: string;
  tokens: Token[];
  finish: string | null;
  first: number | null;
  total: number;
  completion: number | null;
  error: string | null;
  running: boolean;
}

export function body(model: string, s: Settings): Record<string, unknown> {
  const messages = [...(s.system.trim() ? [{ role: "system", content: s.system }] : []), { role: "user", content: s.prompt }];
  return {
    model,
    messages,
    temperature: s.temperature,
    ...(s.top_p < 1 ? { top_p: s.top_p } : {}),
    max_tokens: s.max_tokens,
    ...(s.seed !== null ? { seed: s.seed } : {}),
    ...(s.logprobs ? { logprobs: true, top_logprobs: 5 } : {}),
  };
}

interface Said {
  token: string;
  logprob: number | null;
  bytes: number[] | null;
  top_logprobs: Alternative[];
}

interface Chunk {
  error?: { message?: string };
  usage?: { completion_tokens: number } | null;
  choices?: { delta: { content?: string | null; reasoning_content?: string | null }; finish_reason: string | null; logprobs?: { content: Said[] | null } | null }[];
}

/** Asks, and hands on the answer with every piece of it. */
export async function ask(model: string, settings: Settings, signal: AbortSignal, told: (answer: Answer) => void): Promise<void> {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  let answer: Answer = { text: "", reasoning: "", tokens: [], finish: null, first: null, total: 0, completion: null, error: null, running: true };
  const tell = (more: Partial<Answer>) => told((answer = { ...answer, ...more, total: since() }));
  const spelling = new TextDecoder();
  try {
    const sent = { ...body(model, settings), stream: true, stream_options: { include_usage: true } };
    const reply = await request("v1/chat/completions", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(sent), signal });
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new ApiError(0, chunk.error.message ?? "the answer was broken off");
      const choice = chunk.choices?.[0];
      const tokens = (choice?.logprobs?.content ?? []).map((t) => ({
        token: t.token,
        text: t.bytes ? spelling.decode(Uint8Array.from(t.bytes), { stream: true }) : t.token,
        logprob: t.logprob ?? NaN,
        top: t.top_logprobs,
      }));
      tell({
        text: answer.text + (choice?.delta.content ?? ""),
        reasoning: answer.reasoning + (choice?.delta.reasoning_content ?? ""),
        tokens: tokens.length ? [...answer.tokens, ...tokens] : answer.tokens,
        finish: choice?.finish_reason ?? answer.finish,
        first: answer.first ?? (choice && (choice.delta.content || choice.delta.reasoning_content || tokens.length) ? since() : null),
        completion: chunk.usage?.completion_tokens ?? answer.completion,
      });
    }
    const rest = spelling.decode(); // of a character that was begun and never ended
    const last = answer.tokens[answer.tokens.length - 1];
    tell({ running: false, ...(rest && last ? { tokens: [...answer.tokens.slice(0, -1), { ...last, text: last.text + rest }] } : {}) });
  } catch (error) {
    const stopped = error instanceof DOMException && error.name === "AbortError";
    tell({ running: false, ...(stopped ? { finish: "stopped here" } : { error: error instanceof Error ? error.message : String(error) }) });
  }
}

async function* events(reply: Response): AsyncGenerator<Chunk> {
  const reader = reply.body!.getReader();
  const text = new TextDecoder();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    waiting += text.decode(value, { stream: !done });
    const whole = waiting.split("\n\n");
    waiting = whole.pop()!;
    for (const event of whole) {
      const data = event
        .split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim())
        .join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data) as Chunk;
    }
    if (done) return;
  }
}
