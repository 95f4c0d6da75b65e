// The rows of a run or a file: counts, lengths with the cut, dropped rows by reason, what `trimtab check` found, and the rows themselves.

import { useEffect, useRef, useState } from "preact/hooks";
import { get } from "../api";
import { duration, number, quoted, short } from "../format";
import { Command, Failure, Section } from "../parts";
import { link } from "../route";
import { Lengths } from "./lengths";
import { type Reading, useReading } from "./reading";
import type { DataFacts, Finding, Lost, Report, Row, SplitFacts } from "./types";

const PAGE = 10;
const LOST_PAGE = 50;

export function DataPage({ kind, name }: { kind: string; name: string }) {
  const [base, setBase] = useState("");
  const [asked, setAsked] = useState("");
  const { reading, failed, again } = useReading("studio/rows/open", kind === "run" ? { run: name } : { path: name, base: asked }, [kind, name, asked]);
  const report = reading?.report;
  const subject = reading?.subject ?? name;
  return (
    <>
      <nav class="crumbs" aria-label="Way back">
        <a href={link("data")}>Data</a> <span aria-hidden="true">/</span>
      </nav>
      <header class="run-head">
        <h1>{short_name(subject)}</h1>
        <div class="toolbar">
          <p class="note path grow-all">{subject}</p>
          {kind === "file" && (
            <form
              class="row"
              onSubmit={(e) => {
                e.preventDefault();
                setAsked(base.trim());
              }}
            >
              <label>
                <span>Base</span>
                <input type="text" value={base} placeholder={report?.base ?? ""} onInput={(e) => setBase(e.currentTarget.value)} spellcheck={false} />
              </label>
              <button type="submit" disabled={base.trim() === asked}>
                Read on it
              </button>
            </form>
          )}
          {kind === "file" && (
            <a class="button" href={link("new", name)}>
              Train on it
            </a>
          )}
          {kind === "run" && (
            <a class="button" href={link("runs", name)}>
              Curves and scores
            </a>
          )}
          <button type="button" onClick={again} disabled={reading?.state === "reading"}>
            Read again
          </button>
        </div>
      </header>
      {failed ? <Failure error={failed} /> : null}
      {reading && <Progress reading={reading} />}
      {report && reading?.key && <Shown key={reading.key} report={report} reading={reading.key} subject={subject} base={kind === "file" ? report.base : ""} />}
    </>
  );
}

function short_name(path: string): string {
  return path.split("/").filter(Boolean).slice(-2).join("/") || path;
}

/** How far a reading is; nothing once it is there. */
export function Progress({ reading }: { reading: Reading }) {
  if (reading.state === "failed") return <Failure error={reading.error} />;
  if (reading.state !== "reading") return null;
  return (
    <p class="note" role="status">
      <span class="spinner" aria-hidden="true" /> {reading.status}… {(reading.seconds ?? 0) > 2 ? duration(Math.round(reading.seconds ?? 0)) : ""}
    </p>
  );
}

function Shown({ report, reading, subject, base }: { report: Report; reading: string; subject: string; base: string }) {
  const [at, setAt] = useState<[number, number]>([0, 0]);
  const data = report.data[at[0]] ?? report.data[0];
  const split = data?.splits[at[1]] ?? data?.splits[0];
  if (!data || !split) return <p class="note">It names no rows.</p>;
  const many = report.data.length > 1;
  const command = ["trimtab rows", quoted(subject), base ? `--base ${quoted(base)}` : "", many ? `--data ${quoted(data.name)}` : "", split.name === "train" ? "" : `--split ${split.name}`];
  const said = command.filter(Boolean).join(" ");
  const where = `data.${data.name}`;
  return (
    <>
      <div class="splits" role="group" aria-label="Rows of">
        {report.data.map((d, i) => (
          <div key={d.name} class="pick">
            {many && <span class="note">{d.name}</span>}
            <div class="segments">
              {d.splits.map((s, j) => (
                <button key={s.name} type="button" aria-pressed={d === data && s === split} onClick={() => setAt([i, j])}>
                  {s.name} {number(s.rows)}
                </button>
              ))}
            </div>
          </div>
        ))}
      </div>
      <Facts split={split} data={data} report={report} />
      <div class="halves">
        <Section title="Lengths" id="lengths">
          <Lengths facts={split.lengths} rows={split.rows} />
        </Section>
        <Dropped key={`${where} ${split.name}`} split={split} data={data.name} reading={reading} command={said} />
      </div>
      <Findings findings={report.findings.filter((f) => told_here(f, where))} />
      <Rows key={`${data.name} ${split.name}`} split={split} data={data.name} reading={reading} command={said} />
    </>
  );
}

/** Whether a finding is of these data, or of no data; dropped rows have a section of their own. */
function told_here(f: Finding, where: string): boolean {
  const here = !f.where.startsWith("data.") || f.where === where || f.where.startsWith(`${where}.`);
  return here && !/^\d+ rows? dropped: /.test(f.message);
}

function Facts({ split, data, report }: { split: SplitFacts; data: DataFacts; report: Report }) {
  const lost = split.dropped.reduce((sum, d) => sum + d.count, 0);
  const q = split.quantiles;
  const tiles: [string, string, string][] = [
    ["rows", number(split.rows), split.sources.length > 1 ? `from ${split.sources.length} sources` : "that are used"],
    ["dropped", number(lost), lost ? `${number((100 * lost) / (lost + split.rows), 3)}% of what was read` : "none"],
    ["tokens an epoch", short(split.tokens), `at most ${number(data.max_length)} a row`],
    ["learnt", split.tokens ? `${number((100 * split.supervised) / split.tokens, 3)}%` : "–", `${short(split.supervised)} supervised tokens`],
    ["median length", number(q["median"]), `95% have at most ${number(q["p95"])}, the longest ${number(q["max"])}`],
    ["base", report.base, `${short(report.base_parameters)} parameters, ${number(report.max_positions)} positions`],
  ];
  return (
    <dl class="tiles">
      {tiles.map(([name, value, more]) => (
        <div key={name} class="card">
          <dt>{name}</dt>
          <dd class={value.length > 12 ? "long" : undefined}>{value}</dd>
          <dd class="note">{more}</dd>
        </div>
      ))}
    </dl>
  );
}

function Dropped({ split, data, reading, command }: { split: SplitFacts; data: string; reading: string; command: string }) {
  const [kind, setKind] = useState<string | null>(null);
  const [lost, setLost] = useState<{ total: number; rows: Lost[] } | null>(null);
  const [error, setError] = useState<unknown>(null);
  const asked = useRef("");
  const load = async (wanted: string, before: Lost[]) => {
    asked.current = wanted;
    try {
      const found = await get<{ total: number; rows: Lost[] }>("studio/rows/dropped", {
        key: reading,
        data,
        split: split.name,
        kind: wanted,
        start: before.length,
        count: LOST_PAGE,
      });
      if (asked.current !== wanted) return;
      setLost({ total: found.total, rows: [...before, ...found.rows] });
      setError(null);
    } catch (failed) {
      if (asked.current === wanted) setError(failed);
    }
  };
  const choose = (wanted: string) => {
    const next = wanted === kind ? null : wanted;
    setKind(next);
    setLost(null);
    asked.current = "";
    if (next !== null) void load(next, []);
  };
  return (
    <Section title="Dropped rows" id="dropped">
      {split.dropped.length === 0 ? (
        <p class="note">None: every row that was read is used.</p>
      ) : (
        <ul class="kinds">
          {split.dropped.map((d) => (
            <li key={d.kind}>
              <button type="button" class="kind" aria-expanded={d.kind === kind} onClick={() => choose(d.kind)}>
                <strong>{number(d.count)}</strong>
                <span>{d.kind}</span>
              </button>
              {d.kind === kind && (
                <div class="lost">
                  {d.fix && <p class="note">To mend it: {d.fix}</p>}
                  {error ? <Failure error={error} /> : null}
                  <ul>
                    {lost?.rows.map((row, i) => (
                      <li key={i}>
                        <code>{row.origin}</code> {row.reason}
                      </li>
                    ))}
                  </ul>
                  {lost && lost.rows.length < lost.total && (
                    <button type="button" onClick={() => void load(d.kind, lost.rows)}>
                      {Math.min(LOST_PAGE, lost.total - lost.rows.length)} more of {number(lost.total - lost.rows.length)}
                    </button>
                  )}
                </div>
              )}
            </li>
          ))}
        </ul>
      )}
      <Command text={`${command} --dropped`} says="In a terminal" />
    </Section>
  );
}

const LEVELS = { error: "error", warning: "warning", note: "note" } as const;

/** What `trimtab check` finds, overlap of train and held-out rows among it. */
export function Findings({ findings, title = "What the check found" }: { findings: Finding[]; title?: string }) {
  if (findings.length === 0) return null;
  return (
    <Section title={title} id="findings">
      <ul class="findings">
        {findings.map((f, i) => (
          <li key={i} class={f.level}>
            <p>
              <span class={`state ${f.level}`}>{LEVELS[f.level]}</span> <code>{f.where}</code> {f.message}
            </p>
            {f.items.length > 0 && (
              <details>
                <summary>
                  {f.items.length < f.count ? `the first ${f.items.length} of ${number(f.count)}` : `${f.items.length === 1 ? "which" : `all ${f.items.length}`}`}
                </summary>
                <ul>
                  {f.items.map((item, j) => (
                    <li key={j}>{item}</li>
                  ))}
                </ul>
              </details>
            )}
            {f.fix && <p class="note">To mend it: {f.fix}</p>}
          </li>
        ))}
      </ul>
    </Section>
  );
}

function Rows({ split, data, reading, command }: { split: SplitFacts; data: string; reading: string; command: string }) {
  const [start, setStart] = useState(0);
  const [order, setOrder] = useState("file");
  const [found, setFound] = useState<{ start: number; total: number; rows: Row[] } | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [wanted, setWanted] = useState("");
  useEffect(() => {
    const control = new AbortController();
    get<{ total: number; rows: Row[] }>("studio/rows", { key: reading, data, split: split.name, start, count: PAGE, order }, control.signal).then(
      (rows) => {
        setFound({ start, ...rows });
        setError(null);
      },
      (failed: unknown) => !control.signal.aborted && setError(failed),
    );
    return () => control.abort();
  }, [start, order]);
  if (split.rows === 0) return null;
  const last = Math.max(0, Math.floor((split.rows - 1) / PAGE) * PAGE);
  const more = [command, order === "file" ? "" : `--order ${order}`, start ? `--start ${start}` : "", `--count ${PAGE}`].filter(Boolean).join(" ");
  const pager = (label: string) => (
    <div class="controls" role="group" aria-label={label}>
      <button type="button" disabled={start === 0} onClick={() => setStart(Math.max(0, start - PAGE))}>
        Previous
      </button>
      <span class="note figures">
        {number(start + 1)} to {number(Math.min(start + PAGE, split.rows))} of {number(split.rows)}
      </span>
      <button type="button" disabled={start >= last} onClick={() => setStart(Math.min(last, start + PAGE))}>
        Next
      </button>
    </div>
  );
  return (
    <Section
      title="Rows"
      id="rows"
      aside={
        <div class="controls">
          <label class="pick">
            <span>Order</span>
            <select
              value={order}
              onChange={(e) => {
                setOrder(e.currentTarget.value);
                setStart(0);
              }}
            >
              <option value="file">of the file</option>
              <option value="longest">longest first</option>
              <option value="shortest">shortest first</option>
            </select>
          </label>
          <form
            class="pick"
            onSubmit={(e) => {
              e.preventDefault();
              const n = Number(wanted);
              if (Number.isInteger(n) && n >= 1) setStart(Math.min(n, split.rows) - 1);
            }}
          >
            <label class="pick">
              <span>Go to</span>
              <input class="short" type="number" min={1} max={split.rows} value={wanted} onInput={(e) => setWanted(e.currentTarget.value)} />
            </label>
          </form>
          {pager("Pages of rows")}
        </div>
      }
    >
      <p class="key-of-marks note">
        <mark class="learnt">learnt</mark> <span>read</span> <span class="template">written by the chat template</span>
      </p>
      {error ? <Failure error={error} /> : null}
      {found?.rows.map((row, i) => <RowText key={`${found.start} ${row.number}`} row={row} place={order === "file" ? null : found.start + i + 1} />)}
      {split.rows > PAGE && pager("Pages of rows, below")}
      <Command text={more} says="In a terminal" />
    </Section>
  );
}

function RowText({ row, place }: { row: Row; place: number | null }) {
  return (
    <article class="row-text" aria-label={`Row ${row.number + 1}`}>
      <header class="note">
        <strong>{place === null ? `#${number(row.number + 1)}` : `${number(place)}.`}</strong> <code>{row.origin}</code>
        <span class="figures">
          {number(row.tokens)} tokens, {number(row.targets)} learnt
        </span>
      </header>
      {row.segments.map((segment, i) => (
        <div key={i} class="rendered" role="region" tabIndex={0} aria-label={`Text of row ${row.number + 1}${segment.role ? `, ${segment.role}` : ""}`}>
          {segment.role && <span class="role">{segment.role}</span>}
          {segment.goes_on && <span class="template">… </span>}
          {segment.runs.map(([text, bits], j) => {
            const name = bits & 2 ? "template" : undefined;
            return bits & 1 ? (
              <mark key={j} class={`learnt ${name ?? ""}`}>
                {text}
              </mark>
            ) : (
              <span key={j} class={name}>
                {text}
              </span>
            );
          })}
        </div>
      ))}
    </article>
  );
}
