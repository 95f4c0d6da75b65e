// What the variants cost and score, one table for each data set, the base's row first.

import type { ComponentChildren } from "preact";
import { bytes, duration, number, own, quoted, short } from "../format";
import { type Column, Command, Section, Table } from "../parts";
import { Swatch } from "./swatch";
import type { Metrics } from "./series";
import { type Meaning, type RunFacts, scoreTitle, scoreValue, type Shown } from "./types";

interface Row {
  key: string;
  shown: Shown | null;
  label: string;
  scores: Record<string, number>;
  base: Record<string, number>;
}

interface Props {
  shown: Shown[];
  runs: RunFacts[];
  metrics: Map<string, Metrics>;
  /** Why scores do not compare; nothing is called the best then. */
  doubts: string[];
}

export function Scores({ shown, runs, metrics, doubts }: Props) {
  const sets = [...new Set(shown.map((s) => s.facts.data ?? "data"))];
  const meanings = Object.assign({}, ...runs.map((r) => r.scores)) as Record<string, Meaning>;
  return (
    <Section title="Scores and costs" id="scores">
      <p class="note">On held-out test rows, percentages where a unit is %. The small number is the change from the base{doubts.length ? "." : "; bold is the best."}</p>
      {doubts.map((text) => (
        <p key={text} class="failure" role="note">
          {text}
        </p>
      ))}
      {sets.map((data) => (
        <OneSet key={data} data={data} shown={shown.filter((s) => (s.facts.data ?? "data") === data)} runs={runs} meanings={meanings} metrics={metrics} ranked={!doubts.length} />
      ))}
      <Command text={`trimtab compare ${runs.map((r) => quoted(r.path)).join(" ")}`} says="In a terminal" />
    </Section>
  );
}

const MANY = 3; // scores: with more of them, costs have a table of their own, and no screen cuts either

interface OneSetProps {
  data: string;
  shown: Shown[];
  runs: RunFacts[];
  meanings: Record<string, Meaning>;
  metrics: Map<string, Metrics>;
  ranked: boolean;
}

function OneSet({ data, shown, runs, meanings, metrics, ranked }: OneSetProps) {
  const bases = new Map<string, Row>();
  for (const run of runs) {
    const scores = own(run.base_scores, data);
    if (!scores || Object.keys(scores).length === 0) continue;
    const same = JSON.stringify(scores);
    const known = bases.get(same);
    if (known) known.label += `, ${run.name}`;
    else bases.set(same, { key: `base ${run.id}`, shown: null, label: run.name, scores, base: {} });
  }
  const rows: Row[] = [...bases.values()].map((row) => ({ ...row, label: bases.size === 1 ? "base" : `base (${row.label})` }));
  rows.push(...shown.map((s) => ({ key: String(s.number), shown: s, label: s.label, scores: s.facts.scores, base: own(s.run.base_scores, data) ?? {} })));
  const names = [...new Set(rows.flatMap((r) => Object.keys(r.scores)))];
  const best = new Map(names.map((n) => [n, ranked ? bestOf(n, rows, meanings) : null]));
  const variant: Column<Row> = { key: "variant", title: "variant", cell: (r) => (r.shown ? <Name shown={r.shown} /> : r.label) };
  const measured: Column<Row>[] = [
    { key: "method", title: "method", cell: (r) => r.shown?.facts.method ?? "–" },
    ...names.map((n): Column<Row> => {
      const meaning = meanings[n];
      return {
        key: n,
        title: scoreTitle(n, meaning),
        number: true,
        class: (r) => (r.scores[n] !== undefined && r.scores[n] === best.get(n) ? "best" : undefined),
        cell: (r) => score(r, n, meaning),
      };
    }),
  ];
  const costs: Column<Row>[] = [
    { key: "train", title: "train loss", number: true, cell: (r) => (r.shown ? number(lastLoss(r.shown, metrics), 3) : "–") },
    { key: "kept", title: "kept step", number: true, cell: (r) => (r.shown ? keptStep(r.shown) : "–") },
    { key: "trainable", title: "trainable", number: true, cell: (r) => short(r.shown?.facts.trainable) },
    { key: "size", title: "size", number: true, cell: (r) => bytes(r.shown?.facts.adapter_bytes) },
    { key: "time", title: "own time", number: true, cell: (r) => duration(r.shown?.facts.seconds) },
  ];
  const used = (columns: Column<Row>[]) => [variant, ...columns.filter((c) => rows.some((r) => c.cell(r) !== "–"))];
  const apart = names.length > MANY;
  return (
    <>
      <h3>{data}</h3>
      <Table
        label={`Scores on ${data}`}
        columns={used(apart ? measured : [...measured, ...costs])}
        rows={rows}
        rowKey={(r) => r.key}
        rowClass={(r) => (r.shown ? undefined : "base")}
      />
      {apart && (
        <>
          <h3>{data}: costs</h3>
          <Table label={`Costs on ${data}`} columns={used(costs)} rows={rows.filter((r) => r.shown)} rowKey={(r) => r.key} />
        </>
      )}
      {names.length === 0 && <p class="note">Scores come at the end of a run that has test rows.</p>}
    </>
  );
}

export function Name({ shown }: { shown: Shown }) {
  return (
    <span class="variant">
      <Swatch number={shown.number} />
      <span>{shown.label}</span>
      {shown.facts.stopped && (
        <span class="state stopped" title={shown.facts.stopped}>
          stopped
        </span>
      )}
      {shown.facts.finished_early?.startsWith("stopped by hand") && <span class="state stopped">{shown.facts.finished_early}</span>}
    </span>
  );
}

function score(row: Row, name: string, meaning: Meaning | undefined): ComponentChildren {
  const value = row.scores[name];
  if (value === undefined) return "–";
  const text = scoreValue(value, meaning);
  const base = row.shown ? row.base[name] : undefined;
  if (base === undefined)
    return (
      <>
        {text} <span class="delta" />
      </>
    );
  const change = value - base;
  const sign = change > 0 ? "+" : change < 0 ? "−" : "±";
  return (
    <>
      {text} <span class="delta">{sign + (meaning?.percent ? Math.abs(change).toFixed(1) : number(Math.abs(change), 3))}</span>
    </>
  );
}

/** Whether a score of these variants compares: the loss does not where they have several objectives. */
export function compares(name: string, shown: Shown[]): boolean {
  return name !== "loss" || new Set(shown.map((s) => s.facts.objective)).size < 2;
}

function bestOf(name: string, rows: Row[], meanings: Record<string, Meaning>): number | null {
  if (!compares(name, rows.flatMap((r) => r.shown ?? []))) return null;
  if (rows.filter((r) => r.shown && r.scores[name] !== undefined).length < 2) return null; // nothing to choose between
  const values = rows.flatMap((r) => (r.scores[name] === undefined ? [] : [r.scores[name]!]));
  const better = meanings[name]?.better;
  if (!better || new Set(values).size < 2) return null;
  return better === "higher" ? Math.max(...values) : Math.min(...values);
}

function lastLoss(s: Shown, metrics: Map<string, Metrics>): number | null {
  const loss = metrics.get(s.run.id)?.variants.get(s.facts.name)?.steps.column("loss") ?? new Float64Array();
  const tail = loss.slice(-Math.max(1, Math.floor(loss.length / 10))).filter(Number.isFinite);
  return tail.length ? tail.reduce((a, b) => a + b, 0) / tail.length : null;
}

function keptStep(s: Shown): string {
  const { saved_step: saved, total_steps: total } = s.facts;
  return saved === null || saved === undefined ? "–" : total && total !== saved ? `${saved} of ${total}` : String(saved);
}
