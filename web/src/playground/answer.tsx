// One model's answer: text as it streams, and of each token how likely it was and what else might have come.

import { useState } from "preact/hooks";
import { duration, number, quoted } from "../format";
import { Command } from "../parts";
import { type Answer, body, type Settings, type Token } from "./ask";

export function AnswerColumn({ model, answer, settings, keyed }: { model: string; answer: Answer | undefined; settings: Settings; keyed: boolean }) {
  const [at, choose] = useState<number | null>(null);
  const [touched, setTouched] = useState(false); // room for the alternatives stays once they were asked for: nothing jumps under the pointer
  const setAt = (to: number | null) => {
    choose(to);
    if (to !== null) setTouched(true);
  };
  const tokens = answer ? spelling(answer) : [];
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
    <section class="card column" aria-label={`Answer of ${model}`}>
      <h2>{model}</h2>
      {answer?.reasoning && (
        <details class="note">
          <summary>Reasoning</summary>
          <div class="said">{answer.reasoning}</div>
        </details>
      )}
      <div
        class="said answer"
        tabIndex={tokens.length ? 0 : undefined}
        role={tokens.length ? "application" : undefined}
        aria-roledescription={tokens.length ? "answer" : undefined}
        aria-label={tokens.length ? `${answer?.text ?? ""} Arrow keys go through its tokens.` : undefined}
        aria-busy={answer?.running}
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
          : answer?.text}
        {answer?.running && <span class="caret" aria-hidden="true" />}
        {!answer && <span class="note">No answer yet.</span>}
      </div>
      {answer?.error && (
        <p class="failure" role="alert">
          {answer.error}
        </p>
      )}
      {touched && tokens.length > 0 && (
        <div class="alternatives" role="status">
          {shown && <Alternatives token={shown} />}
        </div>
      )}
      {answer && <p class="note figures">{figures(answer)}</p>}
      {settings.prompt.trim() && (
        <details class="as-command">
          <summary>As a command</summary>
          <Command text={curl(model, settings, keyed)} />
        </details>
      )}
    </section>
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

function curl(model: string, settings: Settings, keyed: boolean): string {
  const where = new URL("v1/chat/completions", document.baseURI).href;
  const header = keyed ? ' -H "authorization: Bearer $TRIMTAB_KEY"' : "";
  return `curl ${quoted(where)} -H 'content-type: application/json'${header} -d ${quoted(JSON.stringify(body(model, settings)))}`;
}
