// One run, or several beside each other: where it stands, curves, scores, settings, answers.

import { useMemo, useRef, useState } from "preact/hooks";
import { get } from "../api";
import { duration, number, quoted, short } from "../format";
import { Command, Failure, usePoll } from "../parts";
import { link } from "../route";
import { Answers } from "./answers";
import { Curves } from "./curves";
import { StateMark } from "./list";
import { Scores } from "./scores";
import { Metrics } from "./series";
import { Settings } from "./settings";
import { Swatch } from "./swatch";
import type { RunFacts, Shown } from "./types";

const REDRAW_MS = 1000; // while a long run is read, piece by piece

export function RunPage({ ids }: { ids: string[] }) {
  const metrics = useRef(new Map(ids.map((id) => [id, new Metrics(id)]))).current;
  const [runs, setRuns] = useState<RunFacts[]>([]);
  const [doubts, setDoubts] = useState<string[]>([]);
  const [version, setVersion] = useState(0);
  const [error, setError] = useState<unknown>(null);
  const [hidden, setHidden] = useState<Set<number>>(new Set());
  const told = useRef(""); // what the metrics said of the facts that are shown
  const drawn = useRef(0);
  const draw = (now: boolean) => {
    if (!now && performance.now() - drawn.current < REDRAW_MS) return;
    setVersion((v) => v + 1);
    drawn.current = performance.now();
  };

  usePoll(
    async () => {
      try {
        const known = [...metrics.values()].reduce((sum, m) => sum + m.version, 0);
        await Promise.all([...metrics.values()].map((m) => m.read(() => draw(false))));
        if ([...metrics.values()].reduce((sum, m) => sum + m.version, 0) !== known) draw(true);
        const now = [...metrics.values()].map((m) => m.facts).join();
        if (told.current !== now) {
          const facts = await Promise.all(ids.map((id) => get<RunFacts>("studio/run", { id })));
          if (ids.length > 1) setDoubts((await get<{ doubts: string[] }>("studio/doubts", { ids: ids.join("+") })).doubts);
          setRuns(facts);
          told.current = now;
        }
        setError(null);
      } catch (failed) {
        told.current = ""; // the run may be another one by the time that it can be read again
        setError(failed);
      }
    },
    1500,
    [],
  );

  const every = useMemo(() => {
    let count = 0;
    return runs.flatMap((run) =>
      run.variants.map((facts): Shown => ({ number: count++, label: runs.length > 1 ? `${run.name} / ${facts.name}` : facts.name, run, facts })),
    );
  }, [runs]);
  const shown = useMemo(() => every.filter((s) => !hidden.has(s.number)), [every, hidden]);
  if (error && runs.length === 0) return <Failure error={error} />;
  if (runs.length === 0) return <p class="note">Reading the run…</p>;
  const toggle = (n: number) => setHidden(new Set(hidden.has(n) ? [...hidden].filter((x) => x !== n) : [...hidden, n]));
  return (
    <>
      <nav class="crumbs" aria-label="Way back">
        <a href={link("runs")}>Runs</a> <span aria-hidden="true">/</span>
      </nav>
      {runs.map((run) => (
        <Head key={run.id} run={run} metrics={metrics.get(run.id)} version={version} />
      ))}
      {error ? <Failure error={error} /> : null}
      {every.length > 1 && (
        <div class="legend" role="group" aria-label="Variants: press one to hide or show it">
          {every.map((s) => (
            <button key={s.number} type="button" aria-pressed={!hidden.has(s.number)} onClick={() => toggle(s.number)}>
              <Swatch number={s.number} /> {s.label}
            </button>
          ))}
        </div>
      )}
      <Curves shown={shown} metrics={metrics} version={version} />
      <Scores shown={shown} runs={runs} metrics={metrics} doubts={doubts} />
      <Settings shown={shown} runs={runs} />
      {runs.map((run) => (
        <Answers key={run.id} run={run} shown={every} />
      ))}
    </>
  );
}

function Head({ run, metrics, version }: { run: RunFacts; metrics: Metrics | undefined; version: number }) {
  const state = metrics?.state ?? run.state;
  const far = useMemo(() => progress(run, metrics), [run, version]);
  const stopped = run.variants.filter((v) => v.stopped);
  const prints = run.base_fingerprint;
  const facts: [string, string][] = [
    ["base", [run.base ?? "–", run.base_parameters ? short(run.base_parameters) : "", run.dtype ?? "", run.device ?? ""].filter(Boolean).join(" · ")],
    ["tokens", short(run.tokens ?? far.tokens)],
    ["time of the steps", duration(run.seconds ?? far.seconds)],
    ["tokens/s", number(run.tokens_per_s ?? far.rate, 3)],
  ];
  if (run.peak_memory_gb) facts.push(["peak memory", `${number(run.peak_memory_gb, 3)} GB`]);
  if (prints.before) facts.push(["base after training", prints.before === prints.after ? "unchanged" : "CHANGED"]);
  return (
    <header class="run-head">
      <h1>
        {run.name} <StateMark state={state} />
      </h1>
      <dl class="facts">
        {facts.map(([name, text]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{text}</dd>
          </div>
        ))}
      </dl>
      {state !== "finished" && far.total > 0 && (
        <div class="progress-line">
          <progress max={far.total} value={far.done} aria-label="Steps done" />
          <span class="note">
            {far.done.toLocaleString("en-US")} of {far.total.toLocaleString("en-US")} steps
            {state === "running" && far.left ? `, about ${duration(far.left)} of steps to go` : ""}
          </span>
        </div>
      )}
      {state === "stopped" && <Command text={`trimtab train RUN.yaml --resume   # out: ${quoted(run.path)}`} says="It is not finished. To go on" />}
      {stopped.map((v) => (
        <p key={v.name} class="failure" role="note">
          {v.name} has stopped: {v.stopped}
        </p>
      ))}
    </header>
  );
}

/** How far a run is that has no summary yet, from its metrics: steps of all variants together. */
function progress(run: RunFacts, metrics: Metrics | undefined) {
  const far = { done: 0, total: 0, tokens: 0, seconds: 0, rate: null as number | null, left: 0 };
  for (const v of run.variants) {
    const lines = metrics?.variants.get(v.name)?.steps;
    const steps = lines?.column("step") ?? [];
    const done = steps[steps.length - 1] ?? 0;
    far.done += done;
    far.total += v.total_steps ?? 0;
    if (!lines || !steps.length) continue;
    const stands = done / steps.length;
    far.tokens += stands * sum(lines.column("tokens"));
    const seconds = stands * sum(lines.column("seconds"));
    far.seconds = Math.max(far.seconds, seconds);
    far.rate = lines.column("tokens_per_s").findLast(Number.isFinite) ?? far.rate;
    far.left = Math.max(far.left, ((v.total_steps ?? done) - done) * (seconds / done));
  }
  return far;
}

function sum(values: number[]): number {
  return values.reduce((a, b) => a + (Number.isFinite(b) ? b : 0), 0);
}
