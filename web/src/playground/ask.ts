// One streamed answer of the ordinary chat route: its text, its calls of tools, and what was said of its tokens.

import { ApiError, request } from "../api";

export interface Alternative {
  token: string;
  logprob: number;
}

export interface Token extends Alternative {
  text: string;
  top: Alternative[];
}

/** A call of a tool. `args` is the text that the model wrote, which need not be JSON. */
export interface Call {
  id: string;
  name: string;
  args: string;
}

export interface Settings {
  system: string;
  prompt: string;
  temperature: number;
  top_p: number;
  max_tokens: number;
  seed: number | null;
  logprobs: boolean;
  /** The definitions of tools as they were typed, a JSON list; empty: there are none. */
  tools: string;
  /** auto, required or none, or `name:` and the tool that is to be called. */
  choice: string;
  /** One call at most in an answer. */
  single: boolean;
}

/** An answer as far as it has come. Times in seconds since it was asked for. */
export interface Answer {
  text: string;
  reasoning: string;
  calls: Call[];
  tokens: Token[];
  finish: string | null;
  first: number | null;
  total: number;
  completion: number | null;
  error: string | null;
  running: boolean;
}

/** An answer, and what its calls were told to have returned, once that was sent. */
export interface Turn {
  answer: Answer;
  results: string[] | null;
}

export const UNASKED: Answer = { text: "", reasoning: "", calls: [], tokens: [], finish: null, first: null, total: 0, completion: null, error: null, running: true };

/** What is sent, as JSON, for the answer that follows these turns, each of which has results. */
export function body(model: string, s: Settings, turns: Turn[], more: object = {}): string {
  const messages = [...(s.system.trim() ? [{ role: "system", content: s.system }] : []), { role: "user", content: s.prompt }, ...turns.flatMap(said)];
  const rest = JSON.stringify({
    model,
    messages,
    ...(s.tools ? { ...choice(s, turns.length > 0), ...(s.single ? { parallel_tool_calls: false } : {}) } : {}),
    temperature: s.temperature,
    ...(s.top_p < 1 ? { top_p: s.top_p } : {}),
    max_tokens: s.max_tokens,
    ...(s.seed !== null ? { seed: s.seed } : {}),
    ...(s.logprobs ? { logprobs: true, top_logprobs: 5 } : {}),
    ...more,
  });
  if (!s.tools) return rest;
  const tools = s.tools.replace(/("(?:[^"\\]|\\.)*")|\s+/g, "$1"); // as it was typed: parsed and written again, a name like "10" would come first
  return `${rest.slice(0, -1)},"tools":${tools}}`;
}

/** A choice that forces a call is for the first answer: with it no answer to a result could be anything but one more call. */
function choice(s: Settings, later: boolean): Record<string, unknown> {
  if (s.choice === "none") return { tool_choice: "none" };
  if (s.choice === "auto" || later) return {};
  return { tool_choice: s.choice.startsWith("name:") ? { type: "function", function: { name: s.choice.slice(5) } } : s.choice };
}

function said({ answer, results }: Turn): object[] {
  const calls = answer.calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.args } }));
  return [
    { role: "assistant", content: answer.text || null, ...(answer.reasoning ? { reasoning_content: answer.reasoning } : {}), tool_calls: calls },
    ...answer.calls.map((c, i) => ({ role: "tool", tool_call_id: c.id, content: results?.[i] ?? "" })),
  ];
}

interface Said {
  token: string;
  logprob: number | null;
  bytes: number[] | null;
  top_logprobs: Alternative[];
}

/** A piece of a call: its first has id and name, and arguments come bit by bit. */
interface CallPiece {
  index: number;
  id?: string | null;
  function?: { name?: string | null; arguments?: string | null };
}

interface Delta {
  content?: string | null;
  reasoning_content?: string | null;
  tool_calls?: CallPiece[] | null;
}

interface Chunk {
  error?: { message?: string };
  usage?: { completion_tokens: number } | null;
  choices?: { delta: Delta; finish_reason: string | null; logprobs?: { content: Said[] | null } | null }[];
}

/** Asks, and hands on the answer with every piece of it. */
export async function ask(model: string, settings: Settings, turns: Turn[], signal: AbortSignal, told: (answer: Answer) => void): Promise<void> {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  let answer = UNASKED;
  const tell = (more: Partial<Answer>) => told((answer = { ...answer, ...more, total: since() }));
  const spelling = new TextDecoder();
  try {
    const sent = body(model, settings, turns, { stream: true, stream_options: { include_usage: true } });
    const reply = await request("v1/chat/completions", { method: "POST", headers: { "content-type": "application/json" }, body: sent, signal });
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new ApiError(0, chunk.error.message ?? "the answer was broken off");
      const choice = chunk.choices?.[0];
      const tokens = (choice?.logprobs?.content ?? []).map((t) => ({
        token: t.token,
        text: t.bytes ? spelling.decode(Uint8Array.from(t.bytes), { stream: true }) : t.token,
        logprob: t.logprob ?? NaN,
        top: t.top_logprobs,
      }));
      const delta = choice?.delta ?? {};
      tell({
        text: answer.text + (delta.content ?? ""),
        reasoning: answer.reasoning + (delta.reasoning_content ?? ""),
        calls: (delta.tool_calls ?? []).reduce(withPiece, answer.calls),
        tokens: tokens.length ? [...answer.tokens, ...tokens] : answer.tokens,
        finish: choice?.finish_reason ?? answer.finish,
        first: answer.first ?? (delta.content || delta.reasoning_content || delta.tool_calls || tokens.length ? since() : null),
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

function withPiece(calls: Call[], piece: CallPiece): Call[] {
  const before = calls[piece.index] ?? { id: "", name: "", args: "" };
  const now = {
    id: piece.id ?? before.id,
    name: before.name + (piece.function?.name ?? ""),
    args: before.args + (piece.function?.arguments ?? ""),
  };
  return [...calls.slice(0, piece.index), now, ...calls.slice(piece.index + 1)];
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
