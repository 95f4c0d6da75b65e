// A new run, step by step: data, base, variants, cost, begin. Beside them the run file as it forms.

import { useEffect, useRef, useState } from "preact/hooks";
import { type About, get, post } from "../api";
import { bytes, duration, number, quoted, short } from "../format";
import { Command, Failure, Section, Table, useCopy, useLoaded } from "../parts";
import { link } from "../route";
import { FileChoice, type Files } from "./choose";
import { Findings, Progress } from "./data";
import { Choice, Field, type Fields, put, Text } from "./fields";
import { useReading } from "./reading";
import type { Report } from "./types";
import { type Choices, type Variant, VariantForm } from "./variant";

interface Content {
  base: string;
  out: string;
  quantize?: string;
  data: Named[];
  defaults: Fields;
  variants: Named[];
}

/** Pairs of a name and its fields: an object would have a variant called "10" before all others, wherever it stands. */
type Named = readonly [string, Fields];

interface Guessed {
  content: Content;
  said: string[];
  rows: number;
  objectives: string[];
  answered: boolean;
}

interface Problem {
  where: string;
  text: string;
}

/** What the user has chosen so far. */
interface Draft {
  path: string;
  base: string;
  quantize: string;
  out: string;
  data: Named[];
  said: string[];
  rows: number;
  /** Objectives that can read the rows. */
  objectives: string[];
  /** The rows have answers of their own. */
  answered: boolean;
  defaults: Fields;
  variants: Variant[];
  /** The variant as it was guessed. */
  guessed: Fields;
}

const FORM_MS = 250;

export function NewRun({ about, path }: { about: About; path: string }) {
  const choices = useLoaded((signal) => get<Choices>("studio/new/choices", {}, signal), []);
  const files = useLoaded((signal) => get<Files>("studio/files", {}, signal), []);
  const [draft, setDraft] = useState<Draft | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [busy, setBusy] = useState(false);
  const [unformed, setUnformed] = useState<unknown>(null);
  const [tries, setTries] = useState(0);
  const [formed, setFormed] = useState<{ text: string; problems: Problem[]; key: string } | null>(null);
  const [asked, setAsked] = useState("");
  const latest = useRef(0);

  const start = async (chosen: string) => {
    setBusy(true);
    setError(null);
    setAsked(chosen);
    try {
      const found = await post<Guessed>("studio/new/guess", { path: chosen, base: draft?.base ?? "" });
      const c = found.content;
      setDraft({
        path: chosen,
        base: c.base,
        quantize: draft?.quantize ?? "",
        out: c.out,
        data: c.data,
        said: found.said,
        rows: found.rows,
        objectives: found.objectives,
        answered: found.answered,
        guessed: c.variants[0]?.[1] ?? {},
        defaults: c.defaults,
        variants: c.variants.map(([name, fields]) => ({ name, fields })),
      });
    } catch (failed) {
      setError(failed);
    }
    setBusy(false);
  };
  useEffect(() => {
    if (path) void start(path);
  }, [path]);
  useEffect(() => {
    if (draft && document.activeElement === document.body) document.getElementById("step-data")?.focus(); // the button that was pressed has gone
  }, [draft?.path]);

  const content = draft && choices.found ? contentOf(draft, choices.found) : null;
  const key = JSON.stringify(content);
  useEffect(() => {
    if (!content || !draft || twice(draft).length) return undefined;
    const mine = ++latest.current;
    const timer = setTimeout(() => {
      post<{ text: string; problems: Problem[] }>("studio/new/form", { content, said: ["Formed on the page of `trimtab studio`.", ...draft.said.map((s) => `- ${s}`)] }).then(
        (found) => {
          if (mine !== latest.current) return;
          setFormed({ ...found, key });
          setUnformed(null);
        },
        (failed: unknown) => mine === latest.current && setUnformed(failed),
      );
    }, FORM_MS);
    return () => clearTimeout(timer);
  }, [key, tries]);

  if (choices.error) return <Failure error={choices.error} again={choices.reload} />;
  if (!choices.found) return <p class="note">Looking up what can be chosen…</p>;
  const known = choices.found;
  const problems = [...(formed?.problems ?? []), ...twice(draft)];
  const wrong = problems.length > 0 || formed?.key !== key; // a text that is not yet of these fields is neither saved nor estimated
  const at = (where: string) => problems.filter((p) => p.where === where).map((p) => after(p));
  const change = (more: Partial<Draft>) => draft && setDraft({ ...draft, ...more });
  return (
    <>
      <div class="page-head">
        <h1>New run</h1>
        <p class="note">Five steps; the run file forms beside them. Nothing is trained before you say so.</p>
      </div>
      <div class="guided">
        <div class="steps">
          <Section title="1. Data" id="step-data" aside={draft ? <a href={link("data", "file", draft.path)}>Look at the rows</a> : undefined}>
            {error ? <Failure error={error} again={asked ? () => void start(asked) : undefined} /> : null}
            {busy && (
              <p class="note" role="status">
                <span class="spinner" aria-hidden="true" /> Looking at the rows…
              </p>
            )}
            {draft && !busy ? (
              <>
                <p class="path">{draft.path}</p>
                <ul class="said-of">
                  {draft.said.map((s) => (
                    <li key={s}>{s}</li>
                  ))}
                </ul>
                {at("data").map((text) => (
                  <Failure key={text} error={text} />
                ))}
                <details>
                  <summary>Take other rows</summary>
                  {files.found && <FileChoice files={files.found} chosen={draft.path} go={(p) => void start(p)} />}
                </details>
              </>
            ) : (
              !busy && (files.found ? <FileChoice files={files.found} go={(p) => void start(p)} /> : files.error ? <Failure error={files.error} again={files.reload} /> : <p class="note">Looking for files…</p>)
            )}
          </Section>
          {draft && (
            <>
              <Section title="2. Base" id="step-base">
                <div class="fields">
                  <Text label="Base" hint="A bundled name, a folder, a hub id or a .gguf file" value={draft.base} errors={at("base")} list={known.bases} set={(base) => change({ base })} wide />
                  <Choice
                    label="Packed while loaded"
                    value={draft.quantize}
                    words={["", ...known.quantize]}
                    shown={(w) => w || "no"}
                    errors={at("quantize")}
                    set={(quantize) => change({ quantize })}
                  />
                </div>
              </Section>
              <Section
                title="3. Variants"
                id="step-variants"
                aside={
                  <button type="button" onClick={() => change({ variants: [...draft.variants, another(draft.variants)] })}>
                    Add a variant
                  </button>
                }
              >
                <p class="note">All of them train together on one copy of the base.</p>
                {draft.variants.map((v, i) => (
                  <VariantForm
                    key={i}
                    variant={v}
                    known={known}
                    rows={draft}
                    at={(field) => at(field ? `variants.${v.name}.${field}` : `variants.${v.name}`)}
                    named={twice(draft).filter((p) => p.where === `variants.${v.name}`).map((p) => p.text)}
                    set={(next) => change({ variants: draft.variants.map((o, j) => (j === i ? next : o)) })}
                    remove={draft.variants.length > 1 ? () => change({ variants: draft.variants.filter((_, j) => j !== i) }) : undefined}
                  />
                ))}
                <h3>Training, of all variants</h3>
                <div class="fields">
                  {known.training
                    .filter((f) => f.name !== "lr")
                    .map((f) => (
                      <Field key={f.name} facts={f} value={draft.defaults[f.name]} errors={at(`defaults.${f.name}`)} set={(x) => change({ defaults: put(draft.defaults, f.name, x) })} />
                    ))}
                </div>
              </Section>
              <Cost text={formed?.text ?? ""} wrong={wrong} />
              <Begin about={about} draft={draft} text={formed?.text ?? ""} wrong={wrong} problems={problems.length} errors={at("out")} set={(out) => change({ out })} root={known.root} />
            </>
          )}
        </div>
        {draft && <RunFile name={draft.out} text={formed?.text ?? ""} problems={problems} error={unformed} again={() => (setUnformed(null), setTries(tries + 1))} />}
      </div>
    </>
  );
}

/** The run file. Variants whose objectives read rows in different ways get a data set for each way, which name the same files. */
function contentOf(draft: Draft, known: Choices): Content {
  const [name, rows] = draft.data[0] ?? ["", {}];
  const data: Named[] = [];
  const sets = new Map<string, string>();
  const variants = draft.variants.map((v) => {
    const aim = String(v.fields["objective"] ?? "sft");
    const reads = known.objectives.find((o) => o.name === aim)?.reads ?? "";
    if (!sets.has(reads)) {
      const { labels, ...others } = rows; // labels that are judged by their likelihoods, which only imitation has
      const own = sets.size ? `${name.slice(0, 50)}-${aim}` : name;
      data.push([own, aim === "sft" || aim === "distil" ? rows : others]);
      sets.set(reads, own);
    }
    return [v.name, { ...v.fields, data: sets.get(reads) }] as const;
  });
  return { base: draft.base, ...(draft.quantize ? { quantize: draft.quantize } : {}), out: draft.out, data, defaults: draft.defaults, variants };
}

/** Names that two variants have: the run file could hold only one of them. */
function twice(draft: Draft | null): Problem[] {
  const names = draft?.variants.map((v) => v.name) ?? [];
  return [...new Set(names.filter((n, i) => names.indexOf(n) !== i))].map((n) => ({ where: `variants.${n}`, text: `two variants are called ${n}` }));
}

/** A problem's text without the place, which the field shows. */
function after(p: Problem): string {
  if (!p.where || !p.text.startsWith(p.where)) return p.text;
  const rest = p.text.slice(p.where.length);
  return rest.startsWith("[") ? `${p.where.split(".").pop()}${rest}` : rest.replace(/^(: | = ('': )?)/, "");
}

function another(variants: Variant[]): Variant {
  const last = variants[variants.length - 1]!;
  const names = new Set(variants.map((v) => v.name));
  let n = 2;
  while (names.has(`${last.name.replace(/-\d+$/, "")}-${n}`)) n++;
  return { name: `${last.name.replace(/-\d+$/, "")}-${n}`, fields: { ...last.fields } };
}

function RunFile({ name, text, problems, error, again }: { name: string; text: string; problems: Problem[]; error: unknown; again: () => void }) {
  const { copied, copy } = useCopy(text);
  return (
    <aside class="card run-file" aria-labelledby="run-file">
      <div class="card-head">
        <h2 id="run-file">{name || "run"}.yaml</h2>
        <div class="controls">
          <button type="button" class="quiet" onClick={copy} disabled={!text}>
            {copied ? "Copied" : "Copy"}
          </button>
          <button type="button" onClick={() => download(`${name || "run"}.yaml`, text)} disabled={!text}>
            Download
          </button>
        </div>
      </div>
      {error ? <Failure error={error} again={again} /> : null}
      <p class={problems.length ? "field-error" : "note"} role="status">
        {error ? "The text below is of what you had chosen before." : !text ? "It forms as you choose." : problems.length ? `${problems.length === 1 ? "One thing is" : `${problems.length} things are`} wrong with it:` : "Nothing is wrong with it."}
      </p>
      {problems.length > 0 && (
        <ul class="problems">
          {problems.map((p, i) => (
            <li key={i}>{p.text}</li>
          ))}
        </ul>
      )}
      <pre tabIndex={0} role="region" aria-label="Text of the run file">
        {text}
      </pre>
    </aside>
  );
}

function download(name: string, text: string): void {
  const address = URL.createObjectURL(new Blob([text], { type: "application/yaml" }));
  const a = document.createElement("a");
  a.href = address;
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function Cost({ text, wrong }: { text: string; wrong: boolean }) {
  const [asked, setAsked] = useState("");
  const { reading, failed } = useReading("studio/new/check", asked ? { text: asked } : null, [asked]);
  const report = reading?.report;
  const stale = asked !== "" && asked !== text;
  return (
    <Section
      title="4. Cost"
      id="step-cost"
      aside={
        <button type="button" disabled={!text || wrong || reading?.state === "reading"} onClick={() => setAsked(text)}>
          {asked ? "Estimate again" : "Read the rows and estimate"}
        </button>
      }
    >
      {!asked && <p class="note">Reads all rows and estimates memory and time, as <code>trimtab check</code> does. Nothing is trained.</p>}
      {failed ? <Failure error={failed} /> : null}
      {reading && <Progress reading={reading} />}
      {report && stale && <p class="note">The run file has changed since: this is of the one before.</p>}
      {report && <Costs report={report} />}
    </Section>
  );
}

function Costs({ report }: { report: Report }) {
  const e = report.estimate;
  const [least, most] = e?.memory_bytes ?? [0, 0];
  const free = e?.available_bytes ?? 0;
  const fits = most <= free ? "good" : least <= free ? "warning" : "error";
  const said = { good: "fits", warning: "may not fit", error: "does not fit" }[fits];
  const flops = report.variants.reduce((sum, v) => sum + v.flops, 0);
  const errors = report.findings.filter((f) => f.level === "error");
  return (
    <>
      {e ? (
        <>
          <dl class="tiles costs">
            <div>
              <dt>memory</dt>
              <dd>
                {gb(least)} to {gb(most)} GB <span class={`state ${fits === "good" ? "finished" : fits}`}>{said}</span>
              </dd>
              <dd class="note">{gb(free)} GB are free on {e.device}, in {e.dtype}</dd>
            </div>
            <div>
              <dt>time</dt>
              <dd>{span(e.seconds)}</dd>
              <dd class="note">
                of all steps{e.judging_seconds[1] > 0 ? `, and ${span(e.judging_seconds)} for scores` : ""}, by a speed measured here just now
              </dd>
            </div>
            <div>
              <dt>work</dt>
              <dd>{short(flops)}FLOP</dd>
              <dd class="note">{short(report.variants.reduce((sum, v) => sum + v.tokens, 0))} tokens, forward and backward</dd>
            </div>
          </dl>
          {report.room && <Failure error={report.room} />}
        </>
      ) : (
        <p class="note">Nothing can be estimated: no variant has rows.</p>
      )}
      {report.variants.length > 0 && (
        <Table
          label="Cost of each variant"
          rows={report.variants}
          rowKey={(v) => v.name}
          columns={[
            { key: "name", title: "variant", cell: (v) => v.name },
            { key: "method", title: "method", cell: (v) => v.method },
            { key: "trainable", title: "trainable", number: true, cell: (v) => short(v.trainable) },
            { key: "bytes", title: "file", number: true, cell: (v) => bytes(v.adapter_bytes) },
            { key: "rows", title: "rows an epoch", number: true, cell: (v) => number(v.rows_per_epoch) },
            { key: "steps", title: "steps", number: true, cell: (v) => number(v.steps) },
            { key: "tokens", title: "tokens", number: true, cell: (v) => short(v.tokens) },
            { key: "seconds", title: "alone", number: true, class: () => "wraps", cell: (v) => span(v.seconds) },
          ]}
        />
      )}
      {errors.length > 0 && (
        <p class="failure" role="note">
          To be mended first: {errors.map((f) => f.message).join("; ")}
        </p>
      )}
      <Findings findings={report.findings} title="What the check found" />
    </>
  );
}

function gb(n: number): string {
  return number(n / 1e9, 3);
}

function span([least, most]: [number, number]): string {
  const told = (s: number) => (s < 120 ? duration(Math.round(s)) : s < 7200 ? `${Math.round(s / 60)} min` : `${number(s / 3600, 2)} h`);
  const [a, b] = [told(least), told(most)];
  return a === b ? a : `${a} to ${b}`;
}

function Begin({ about, draft, text, wrong, problems, errors, root, set }: { about: About; draft: Draft; text: string; wrong: boolean; problems: number; errors: string[]; root: string; set: (out: string) => void }) {
  const [done, setDone] = useState<{ path: string; begun: boolean } | null>(null);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>(null);
  const file = `${root}/${draft.out}.yaml`; // where it is saved, and where a downloaded one belongs: its paths start there
  useEffect(() => setDone(null), [text]);
  const save = async (begin: boolean) => {
    setBusy(true);
    setError(null);
    try {
      const saved = done ?? { ...(await post<{ path: string; file: string }>("studio/new/save", { name: draft.out, text })), begun: false };
      setDone(saved);
      if (begin) {
        await post("studio/begin", { file: `${draft.out}.yaml` });
        setDone({ ...saved, begun: true });
      }
    } catch (failed) {
      setError(failed);
    }
    setBusy(false);
  };
  return (
    <Section title="5. Begin" id="step-begin">
      <div class="fields">
        <Text label="Name of the run" hint={`Its folder and its file, in ${root}`} value={draft.out} errors={errors} set={set} wide />
      </div>
      {error ? <Failure error={error} /> : null}
      {done ? (
        <p class="note" role="status">
          {done.begun ? (
            <>
              It has begun. <a href={link("runs")}>Follow it among the runs</a>.
            </>
          ) : (
            `Saved: ${done.path}`
          )}
        </p>
      ) : null}
      <div class="row">
        {about.changes && (
          <button type="button" class="main" disabled={busy || wrong || !text || done?.begun} onClick={() => void save(true)}>
            Save and begin
          </button>
        )}
        {about.changes && (
          <button type="button" disabled={busy || wrong || !text || done !== null} onClick={() => void save(false)}>
            Save the run file
          </button>
        )}
        {about.changes && problems > 0 && (
          <span class="note">
            {problems === 1 ? "One value is wrong" : `${problems} values are wrong`}: see the run file, {file.split("/").at(-1)}.
          </span>
        )}
      </div>
      <div class="commands">
        <Command says="What it costs" text={`trimtab check ${quoted(file)}`} />
        <Command says="Train" text={`trimtab train ${quoted(file)}`} />
      </div>
    </Section>
  );
}
