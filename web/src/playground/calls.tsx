// The calls of an answer, as cards: the tool, its arguments, and what it returned, which whoever looks on types.

import type { Call } from "./ask";

/** The arguments, name and value, as they were written: parsed and shown again, large numbers would lose digits and a name like "10" would
 * come first. null where the text is no JSON object (yet). */
function parsed(text: string): [string, string][] | null {
  let given: unknown;
  try {
    given = JSON.parse(text || "{}");
  } catch {
    return null;
  }
  if (typeof given !== "object" || given === null || Array.isArray(given)) return null;
  const found: [string, string][] = [];
  let [depth, name, value]: [number, string | null, string] = [0, null, ""];
  for (const [word] of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g)) {
    if (word === "}" || word === "]") depth--;
    if (depth === 0 || (depth === 1 && word === ",")) {
      if (name !== null) found.push([name, shown(value)]);
      [name, value] = [null, ""];
    } else if (depth === 1 && word === ":") [name, value] = [JSON.parse(value) as string, ""];
    else value += word === "," || word === ":" ? `${word} ` : word;
    if (word === "{" || word === "[") depth++;
  }
  return found;
}

function shown(value: string): string {
  return value.startsWith('"') ? (JSON.parse(value) as string) : value;
}

interface Props {
  calls: Call[];
  running: boolean;
  /** What was sent as their results; null: nothing yet. */
  sent: string[] | null;
  /** What is typed as the result of a call. */
  typed: (call: Call) => string;
  onTyped: (call: Call, text: string) => void;
  onSend: (() => void) | null;
}

export function Calls({ calls, running, sent, typed, onTyped, onSend }: Props) {
  const ready = calls.every((call) => typed(call).trim());
  const onKey = (event: KeyboardEvent) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (ready) onSend?.();
  };
  return (
    <div class="calls">
      <ol>
        {calls.map((call, i) => (
          <li key={i} class="call" aria-label={`Call of ${call.name}`}>
            <h3>
              <span class="note">calls</span> <code>{call.name}</code>
            </h3>
            <Arguments text={call.args} running={running} />
            {sent ? (
              <div class="result">
                <span class="note">returned</span>
                <pre tabIndex={0}>{sent[i]}</pre>
              </div>
            ) : (
              onSend && (
                <label>
                  <span>What {call.name} returns</span>
                  <textarea class="mono" rows={2} spellcheck={false} value={typed(call)} onInput={(e) => onTyped(call, e.currentTarget.value)} onKeyDown={onKey} />
                </label>
              )
            )}
          </li>
        ))}
      </ol>
      {running && <span class="caret" aria-hidden="true" />}
      {!sent && onSend && (
        <div class="row">
          <button type="button" class="main" disabled={!ready} onClick={onSend}>
            Send {calls.length === 1 ? "the result" : `${calls.length} results`} and go on
          </button>
        </div>
      )}
    </div>
  );
}

function Arguments({ text, running }: { text: string; running: boolean }) {
  const found = parsed(text);
  if (!found) {
    return (
      <>
        <pre tabIndex={0}>{text}</pre>
        {!running && <p class="note">These arguments are no JSON object.</p>}
      </>
    );
  }
  if (!found.length) return running ? null : <p class="note">without arguments</p>;
  return (
    <dl class="arguments">
      {found.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}
