// What several screens show: commands to copy, errors, tables that become cards on a phone.

import { type ComponentChildren, Fragment } from "preact";
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { attended, onReturn } from "./attended";

/** Copies a text; `copied` is true for a moment after it has. */
export function useCopy(text: string): { copied: boolean; copy: () => Promise<void> } {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setCopied(true);
      setTimeout(() => setCopied(false), 1500);
    } catch {
      setCopied(false); // a browser that does not allow it: the text can be selected
    }
  };
  return { copied, copy };
}

/** A command line that does what is shown or done here, with a button that copies it. */
export function Command({ text, says }: { text: string; says?: string }) {
  const { copied, copy } = useCopy(text);
  return (
    <div class="command">
      {says && <span class="command-says">{says}</span>}
      <code tabIndex={0}>{text}</code>
      <button type="button" class="quiet" onClick={copy} aria-label={`Copy: ${text.slice(0, 60)}`}>
        {copied ? "Copied" : "Copy"}
      </button>
    </div>
  );
}

/** again: what a button tries once more. */
export function Failure({ error, again }: { error: unknown; again?: (() => void) | undefined }) {
  return (
    <div class="failure" role="alert">
      {error instanceof Error ? error.message : String(error)}
      {again && (
        <>
          {" "}
          <button type="button" class="quiet" onClick={again}>
            Try again
          </button>
        </>
      )}
    </div>
  );
}

/** What a `select` offers: each word stands for itself. */
export function Options({ words }: { words: string[] }) {
  return (
    <>
      {words.map((word) => (
        <option key={word} value={word}>
          {word}
        </option>
      ))}
    </>
  );
}

/** Names and what they are. */
export function Facts({ look, facts }: { look: "facts" | "pairs"; facts: [string, string][] }) {
  return (
    <dl class={look}>
      {facts.map(([name, text]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{text}</dd>
        </div>
      ))}
    </dl>
  );
}

/** A path, which may break behind each of its folders. */
export function Path({ text }: { text: string }) {
  return (
    <span class="path">
      {text.split("/").map((part, i) => (
        <Fragment key={i}>
          {i > 0 && (
            <>
              /<wbr />
            </>
          )}
          {part}
        </Fragment>
      ))}
    </span>
  );
}

export function Empty({ children }: { children: ComponentChildren }) {
  return <div class="empty">{children}</div>;
}

export function Section({ title, id, aside, children }: { title: string; id: string; aside?: ComponentChildren; children: ComponentChildren }) {
  return (
    <section class="card" aria-labelledby={id}>
      <div class="card-head">
        <h2 id={id} tabIndex={-1}>
          {title}
        </h2>
        {aside}
      </div>
      {children}
    </section>
  );
}

export interface Column<Row> {
  key: string;
  title: string;
  cell: (row: Row) => ComponentChildren;
  number?: boolean;
  class?: (row: Row) => string | undefined;
}

const MOST_ROWS = 200; // of a table at first: a thousand variants in five tables take seconds to lay out

/** A table whose first column names the row. On a phone each row is a card, and each cell says what it is. */
export function Table<Row>({
  label,
  columns,
  rows,
  rowKey,
  rowClass,
  narrow,
}: {
  label: string;
  columns: Column<Row>[];
  rows: Row[];
  rowKey: (row: Row) => string;
  rowClass?: (row: Row) => string | undefined;
  /** As wide as its cells, not as the page. */
  narrow?: boolean;
}) {
  const [whole, setWhole] = useState(false);
  const frame = useRef<HTMLDivElement>(null);
  const shown = whole || rows.length <= MOST_ROWS ? rows : rows.slice(0, MOST_ROWS);
  return (
    <div class="table-frame" role="region" aria-label={label} tabIndex={0} ref={frame}>
      <table role="table" class={narrow ? "narrow" : undefined}>
        <thead role="rowgroup">
          <tr role="row">
            {columns.map((c) => (
              <th key={c.key} scope="col" role="columnheader" class={c.number ? "number" : undefined}>
                {c.title}
              </th>
            ))}
          </tr>
        </thead>
        <tbody role="rowgroup">
          {shown.map((row) => (
            <tr key={rowKey(row)} role="row" class={rowClass?.(row)}>
              {columns.map((c, i) => {
                const content = c.cell(row);
                const name = [c.number ? "number" : "", c.class?.(row) ?? "", content === "–" ? "none" : ""].join(" ").trim() || undefined;
                return i === 0 ? (
                  <th key={c.key} scope="row" role="rowheader" class={name}>
                    {content}
                  </th>
                ) : (
                  <td key={c.key} role="cell" class={name} data-label={c.title}>
                    <span class="cell">{content}</span>
                  </td>
                );
              })}
            </tr>
          ))}
        </tbody>
      </table>
      {shown.length < rows.length && (
        <p class="note">
          These are the first {shown.length}.{" "}
          <button type="button" class="quiet" onClick={() => (setWhole(true), frame.current?.focus({ preventScroll: true }))}>
            Show the other {rows.length - shown.length}
          </button>
        </p>
      )}
    </div>
  );
}

const AWAY = 3; // times as long between two calls while nobody is at the page

/** Calls `work` now and then every `ms`, less often while nobody is at the page, not while it is hidden, and never twice at a time. ms: null:
 * once. */
export function usePoll(work: () => Promise<void>, ms: number | null, depends: unknown[]): void {
  const latest = useRef(work);
  latest.current = work;
  useEffect(() => {
    let over = false;
    let timer = 0; // of the next call; 0 during one
    const turn = async () => {
      timer = 0;
      if (!document.hidden) await latest.current().catch(() => undefined);
      if (!over && ms !== null) timer = window.setTimeout(turn, attended() ? ms : AWAY * ms);
    };
    const end = onReturn(() => {
      if (timer === 0) return;
      clearTimeout(timer);
      void turn();
    });
    void turn();
    return () => {
      over = true;
      clearTimeout(timer);
      end();
    };
  }, [ms, ...depends]);
}

export function useLoaded<T>(load: (signal: AbortSignal) => Promise<T>, depends: unknown[]) {
  const [state, setState] = useState<{ found?: T; error?: unknown }>({});
  const again = useRef(0);
  const [count, setCount] = useState(0);
  useEffect(() => {
    const control = new AbortController();
    load(control.signal).then(
      (found) => !control.signal.aborted && setState({ found }),
      (error: unknown) => !control.signal.aborted && setState({ error }),
    );
    return () => control.abort();
  }, [count, ...depends]);
  const reload = useCallback(() => setCount(++again.current), []);
  return { ...state, reload };
}
