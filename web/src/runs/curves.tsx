// All charts of the chosen runs, with one axis, one zoom and one cursor.

import { useMemo, useState } from "preact/hooks";
import { Section } from "../parts";
import { Chart, type Curve, type Range } from "./chart";
import { type Axis, type Lines, type Metrics, placeOf, type Points } from "./series";
import type { Shown } from "./types";

const AXES: { key: Axis; title: string }[] = [
  { key: "step", title: "step" },
  { key: "tokens", title: "tokens" },
  { key: "seconds", title: "seconds" },
];
const NO_CHART = new Set(["step", "epoch", "tokens", "supervised_tokens", "seconds", "loss", "best"]);
const TITLES: Record<string, string> = { lr: "learning rate", grad_norm: "gradient norm, before clipping", tokens_per_s: "tokens/s, all variants together" };
const SHORT = 60;
const FIRST = ["lr", "tokens_per_s", "grad_norm"];

interface Props {
  shown: Shown[];
  metrics: Map<string, Metrics>;
  version: number;
}

export function Curves({ shown, metrics, version }: Props) {
  const [axis, setAxis] = useState<Axis>("step");
  const [chosen, setWeight] = useState<number | null>(null);
  const [log, setLog] = useState(false);
  const [range, setRange] = useState<Range>(null);

  const places = useMemo(() => {
    const found = shown.map((s) => [s.number, placed(s, metrics, axis)] as const);
    return new Map(found.flatMap(([n, place]) => (place ? [[n, place] as const] : [])));
  }, [shown, metrics, version, axis]);
  const there = shown.filter((s) => places.has(s.number));
  const longest = Math.max(0, ...there.map((s) => places.get(s.number)!.steps.length));
  const weight = chosen ?? (longest < SHORT ? 0 : 0.5); // of a short run every value is seen, the last one above all
  const loss = useMemo(() => there.map((s) => lossCurve(s, places.get(s.number)!, weight, there.length <= 6)), [places, weight]);
  const others = useMemo(() => {
    const fields = new Set(there.flatMap((s) => places.get(s.number)!.steps.fields));
    const ordered = [...FIRST.filter((f) => fields.has(f)), ...[...fields].filter((f) => !FIRST.includes(f) && !NO_CHART.has(f))];
    return ordered.map((field) => ({ field, curves: fieldCurves(field, there, places, weight) })).filter((c) => c.curves.length);
  }, [places, weight]);
  const title = AXES.find((a) => a.key === axis)!.title;
  const change = (to: Axis) => {
    setAxis(to);
    setRange(null);
  };

  if (there.length === 0)
    return (
      <Section title="Curves" id="curves">
        <p class="note">{shown.length ? "No step has been made yet." : "All variants are hidden."}</p>
      </Section>
    );
  return (
    <Section
      title="Curves"
      id="curves"
      aside={
        <div class="controls">
          <div class="segments" role="group" aria-label="Horizontal axis">
            {AXES.map((a) => (
              <button key={a.key} type="button" aria-pressed={axis === a.key} onClick={() => change(a.key)}>
                {a.title}
              </button>
            ))}
          </div>
          <label class="slider">
            <span>Smoothing</span>
            <input
              type="range"
              min="0"
              max="0.99"
              step="0.01"
              value={weight}
              aria-valuetext={weight === 0 ? "none" : weight.toFixed(2)}
              onInput={(e) => setWeight(Number(e.currentTarget.value))}
            />
          </label>
          <label class="check">
            <input type="checkbox" checked={log} onChange={(e) => setLog(e.currentTarget.checked)} /> log loss
          </label>
          <button type="button" disabled={!range} onClick={() => setRange(null)}>
            Show all
          </button>
        </div>
      }
    >
      <Chart title="Loss, nats a target" xTitle={title} curves={loss} range={range} onRange={setRange} log={log} height={340} group="runs" />
      <p class="note key-line">Lines: training. Rings: validation. Diamond: the step whose tensors are kept. Drag to zoom, double click for all.</p>
      <div class="charts">
        {others.map(({ field, curves }) => (
          <Chart
            key={field}
            title={TITLES[field] ?? field.replaceAll("_", " ")}
            xTitle={title}
            curves={curves}
            range={range}
            onRange={setRange}
            log={field === "grad_norm" && positive(curves)}
            height={190}
            group="runs"
          />
        ))}
      </div>
    </Section>
  );
}

interface Placed {
  steps: Lines;
  valid: Lines;
  x: Float64Array;
  ringX: Float64Array;
}

function placed(s: Shown, metrics: Map<string, Metrics>, axis: Axis): Placed | null {
  const mine = metrics.get(s.run.id)?.variants.get(s.facts.name);
  if (!mine || mine.steps.length === 0) return null;
  const x = mine.steps.along(axis);
  const ringX = mine.valid.column("step").map((step) => placeOf(step, mine.steps, x) ?? NaN);
  return { steps: mine.steps, valid: mine.valid, x, ringX };
}

function lossCurve(s: Shown, p: Placed, weight: number, withRaw: boolean): Curve {
  const rings = points(p.ringX, p.valid.column("valid_loss"));
  const line = { x: p.x, y: p.steps.smoothed("loss", weight) };
  return {
    number: s.number,
    label: s.label,
    line,
    ...(withRaw && weight > 0 ? { raw: { x: p.x, y: p.steps.column("loss") } } : {}),
    ...(rings ? { rings } : {}),
    ...kept(s, p, line, rings),
  };
}

/** Where the kept step is: the run says it at its end, the validations say which is best so far. */
function kept(s: Shown, p: Placed, line: Points, rings: Points | undefined): { kept?: { x: number; y: number } } {
  if (s.facts.unsaved) return {};
  const best = p.valid.column("best");
  const steps = p.valid.column("step");
  const last = best.findLastIndex((b) => b === 1);
  const step = s.facts.saved_step ?? (last >= 0 && s.facts.settings["keep_best"] !== false ? steps[last]! : null);
  if (step === null) return {};
  const x = placeOf(step, p.steps, p.x);
  const ring = rings ? steps.indexOf(step) : -1;
  const at = p.steps.column("step").indexOf(step);
  const y = ring >= 0 ? rings!.y[ring]! : at >= 0 ? line.y[at]! : NaN;
  return x !== null && Number.isFinite(y) ? { kept: { x, y } } : {};
}

function fieldCurves(field: string, there: Shown[], places: Map<number, Placed>, weight: number): Curve[] {
  const of = field === "tokens_per_s" ? there.filter((s, i) => there.findIndex((o) => o.run.id === s.run.id) === i) : there;
  return of.flatMap((s) => {
    const p = places.get(s.number)!;
    const y = p.steps.column(field);
    if (!y.some(Number.isFinite)) return [];
    const rings = points(p.ringX, p.valid.column(`valid_${field}`));
    const label = field === "tokens_per_s" ? s.run.name : s.label;
    return [{ number: s.number, label, line: { x: p.x, y: p.steps.smoothed(field, field === "lr" ? 0 : weight) }, ...(rings ? { rings } : {}) }];
  });
}

function points(x: Float64Array, y: Float64Array): Points | undefined {
  return y.some(Number.isFinite) ? { x, y } : undefined;
}

function positive(curves: Curve[]): boolean {
  return curves.every(({ line: { y } }) => {
    for (let i = 0; i < y.length; i++) if (y[i]! <= 0) return false;
    return true;
  });
}
