// One model's answer: text as it streams, and of each token how likely it was and what else might have come.

import { useEffect, useRef, useState } from "preact/hooks";
import { duration, number, quoted } from "../format";
import { Command, Failure } from "../parts";
import { type Answer, body, type Call, type Settings, type Token, type Turn } from "./ask";
import { Calls } from "./calls";

interface Props {
  model: string;
  turns: Turn[];
  /** What the next command asks: as the form has it, or as it was when the answer was asked for whose calls have results. */
  settings: Settings;
  keyed: boolean;
  typed: (call: Call) => string;
  onTyped: (call: Call, text: string) => void;
  /** Sends the results of the last answer's calls. */
  onSend: () => void;
  /** Asks once more for the last answer, which failed. */
  onAgain: () => void;
}

export function AnswerColumn({ model, turns, settings, keyed, typed, onTyped, onSend, onAgain }: Props) {
  const last = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (turns.length > 1 && document.activeElement === document.body) last.current?.focus({ preventScroll: true }); // what was pressed has gone
  }, [turns.length, turns[turns.length - 1]?.answer.error]);
  return (
    <section class="card column" aria-label={`Answer of ${model}`}>
      <h2>{model}</h2>
      {turns.length === 0 && <Said answer={undefined} />}
      {turns.map((turn, i) => (
        <div key={i} class="turn" role="group" aria-label={`Answer ${i + 1}`} tabIndex={-1} ref={i === turns.length - 1 ? last : undefined}>
          <Said answer={turn.answer} />
          {turn.answer.calls.length > 0 && (
            <Calls
              calls={turn.answer.calls}
              running={turn.answer.running}
              sent={turn.results}
              typed={typed}
              onTyped={onTyped}
              onSend={turn.answer.running || turn.answer.error ? null : onSend}
            />
          )}
          {turn.answer.error && <Failure error={turn.answer.error} again={i > 0 ? onAgain : undefined} />}
          <p class="note figures">{figures(turn.answer)}</p>
        </div>
      ))}
      {settings.prompt.trim() && (
        <details class="as-command">
          <summary>As a command</summary>
          <Command text={curl(model, settings, turns.slice(0, -1), keyed)} />
        </details>
      )}
    </section>
  );
}

/** Reasoning and text. The tokens of an answer that calls spell the call too: they can be looked at beneath it. */
function Said({ answer }: { answer: Answer | undefined }) {
  const tokens = answer ? spelling(answer) : [];
  const calls = !!answer?.calls.length;
  const rest = calls && !tokens.length && !answer.running ? answer.tokens : [];
  return (
    <>
      {answer?.reasoning && (
        <details class="note">
          <summary>Reasoning</summary>
          <div class="said">{answer.reasoning}</div>
        </details>
      )}
      {(!calls || answer.text) && <Tokens text={answer?.text ?? ""} tokens={tokens} running={!!answer?.running} missing={!answer} />}
      {rest.length > 0 && (
        <details class="note">
          <summary>As the model wrote it</summary>
          <Tokens text={rest.map((t) => t.text).join("")} tokens={rest} running={false} missing={false} />
        </details>
      )}
    </>
  );
}

function Tokens({ text, tokens, running, missing }: { text: string; tokens: Token[]; running: boolean; missing: boolean }) {
  const [at, choose] = useState<number | null>(null);
  const [touched, setTouched] = useState(false); // room for the alternatives stays once they were asked for: nothing jumps under the pointer
  const setAt = (to: number | null) => {
    choose(to);
    if (to !== null) setTouched(true);
  };
  const shown = at !== null ? tokens[at] : undefined;
  const onKey = (event: KeyboardEvent) => {
    if (!tokens.length) return;
    const here = at ?? -1;
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    setAt(Math.max(0, Math.min(tokens.length - 1, to)));
  };
  return (
    <>
      <div
        class="said answer"
        tabIndex={tokens.length ? 0 : undefined}
        role={tokens.length ? "application" : undefined}
        aria-roledescription={tokens.length ? "answer" : undefined}
        aria-label={tokens.length ? `${text} Arrow keys go through its tokens.` : undefined}
        aria-busy={running}
        onKeyDown={onKey}
        onMouseLeave={() => setAt(null)}
        onBlur={() => setAt(null)}
      >
        {tokens.length
          ? tokens.map((t, i) => (
              <span key={i} class={`token ${level(t)} ${i === at ? "at" : ""}`} onMouseEnter={() => setAt(i)}>
                {t.text}
              </span>
            ))
          : text}
        {running && <span class="caret" aria-hidden="true" />}
        {missing && <span class="note">No answer yet.</span>}
      </div>
      {touched && tokens.length > 0 && (
        <div class="alternatives" role="status">
          {shown && <Alternatives token={shown} />}
        </div>
      )}
    </>
  );
}

/** The tokens that spell the answer's text: without the one that ended it. None where they spell something else, as with a call of a tool. */
function spelling(answer: Answer): Token[] {
  let length = 0;
  let count = 0;
  for (const token of answer.tokens) {
    if (length >= answer.text.length || !answer.text.startsWith(token.text, length)) break;
    length += token.text.length;
    count++;
  }
  return length === answer.text.length ? answer.tokens.slice(0, count) : [];
}

function Alternatives({ token }: { token: Token }) {
  const rows = token.top.some((t) => t.token === token.token && t.logprob === token.logprob) ? token.top : [{ token: token.token, logprob: token.logprob }, ...token.top];
  return (
    <ul>
      {rows.map((t, i) => (
        <li key={i} class={t.token === token.token ? "taken" : undefined}>
          <code>{spelt(t.token)}</code>
          <meter min={0} max={1} value={Math.exp(t.logprob)} aria-hidden="true" />
          <span class="share">{share(t.logprob)}</span>
        </li>
      ))}
    </ul>
  );
}

function spelt(token: string): string {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
}

function share(logprob: number): string {
  const p = Math.exp(logprob) * 100;
  return p >= 0.1 ? `${p.toFixed(1)}%` : "<0.1%";
}

function level(token: Token): string {
  const p = Math.exp(token.logprob);
  return p >= 0.6 ? "" : p >= 0.25 ? "doubt-1" : p >= 0.05 ? "doubt-2" : "doubt-3";
}

function figures(answer: Answer): string {
  const count = answer.completion ?? answer.tokens.length;
  const rate = answer.first !== null && count > 1 && answer.total > answer.first ? (count - 1) / (answer.total - answer.first) : null;
  return [
    count ? `${count} tokens` : "",
    answer.first !== null ? `first after ${duration(answer.first)}` : "",
    rate && !answer.running ? `${number(rate, 3)} tokens/s` : "",
    answer.finish ? `ended: ${answer.finish}` : "",
  ]
    .filter(Boolean)
    .join(" · ");
}

function curl(model: string, settings: Settings, turns: Turn[], keyed: boolean): string {
  const where = new URL("v1/chat/completions", document.baseURI).href;
  const header = keyed ? ' -H "authorization: Bearer $TRIMTAB_KEY"' : "";
  return `curl ${quoted(where)} -H 'content-type: application/json'${header} -d ${quoted(body(model, settings, turns))}`;
}
