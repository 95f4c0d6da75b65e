// The metrics of a run as they come in, and what is drawn of them.

import { get } from "../api";
import type { Columns, MetricsPart, State } from "./types";

export type Axis = "step" | "tokens" | "seconds";

/** Points of one line of a chart; y is NaN where nothing is known. */
export interface Points {
  x: number[];
  y: number[];
}

/** Rows of one variant, columns by field. A field that came late is NaN before. */
export class Lines {
  private columns = new Map<string, number[]>();
  length = 0;

  get fields(): string[] {
    return [...this.columns.keys()];
  }

  column(field: string): number[] {
    return this.columns.get(field) ?? [];
  }

  /** Appends. Steps that are there already are said anew: what came from the first of them on is replaced. */
  add(more: Columns): void {
    const steps = more["step"];
    const first = steps?.[0];
    if (!steps || first === undefined || first === null) return;
    const known = this.column("step");
    let keep = this.length;
    while (keep > 0 && known[keep - 1]! >= first) keep--;
    for (const column of this.columns.values()) column.length = keep;
    for (const field of Object.keys(more)) if (!this.columns.has(field)) this.columns.set(field, new Array<number>(keep).fill(NaN));
    for (const [field, column] of this.columns) {
      const values = more[field];
      for (let i = 0; i < steps.length; i++) column.push(values?.[i] ?? NaN);
    }
    this.length = keep + steps.length;
  }
}

export interface Variant {
  steps: Lines;
  valid: Lines;
}

/** Follows the metrics of one run. `version` grows with each change. */
export class Metrics {
  variants = new Map<string, Variant>();
  version = 0;
  state: State | null = null;
  private next = 0;
  private mark = "";
  private written = "";
  private restarts = 0;

  constructor(readonly id: string) {}

  /** Another text once the run's facts (`studio/run`) may have changed. */
  get facts(): string {
    return `${this.state} ${this.restarts} ${this.written}`;
  }

  /** Reads what is new, piece by piece; `onPart` hears of each, so that a long run is drawn while it is read. */
  async read(onPart: () => void): Promise<void> {
    for (;;) {
      const part = await get<MetricsPart>("studio/metrics", { id: this.id, start: this.next, mark: this.mark });
      if (part.restart) {
        this.variants.clear();
        this.restarts++;
      }
      const changed = part.next !== this.next || part.restart || part.state !== this.state;
      [this.next, this.mark, this.state, this.written] = [part.next, part.mark, part.state, part.written];
      for (const [name, kinds] of Object.entries(part.variants)) {
        let mine = this.variants.get(name);
        if (!mine) this.variants.set(name, (mine = { steps: new Lines(), valid: new Lines() }));
        mine.steps.add(kinds.steps);
        mine.valid.add(kinds.valid);
      }
      if (changed) {
        this.version++;
        onPart();
      }
      if (!part.more) return;
    }
  }
}

/** The axis' value of each line: its step, or the tokens or seconds up to it. Where not every step is logged, a line counts for those
 * that it stands for. */
export function along(lines: Lines, axis: Axis): number[] {
  const steps = lines.column("step");
  if (axis === "step") return steps;
  const each = lines.column(axis);
  let sum = 0;
  return steps.map((step, i) => {
    const stands = Math.max(1, step - (steps[i - 1] ?? 0));
    const more = each[i] ?? NaN;
    return (sum += Number.isNaN(more) ? 0 : more * stands);
  });
}

/** Where on an axis a step is. */
export function placeOf(step: number, lines: Lines, x: number[]): number | null {
  const steps = lines.column("step");
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle]! < step) low = middle + 1;
    else high = middle;
  }
  return low < steps.length ? x[low]! : (x[steps.length - 1] ?? null);
}

/** Exponential moving average without the bias of its start; what is not known stays out. */
export function smoothed(y: number[], weight: number): number[] {
  if (weight <= 0) return y;
  let sum = 0;
  let norm = 0;
  return y.map((v) => {
    if (!Number.isFinite(v)) return v;
    sum = weight * sum + (1 - weight) * v;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

const MAX_POINTS = 1200;

/** All lines over one list of x, as the chart wants them. Beyond so many x, means of bins: a screen shows no more. */
export function aligned(lines: Points[], range: [number, number] | null): [number[], ...(number | null)[][]] {
  const inside = (v: number) => !range || (v >= range[0] && v <= range[1]);
  const all = new Set<number>();
  for (const line of lines) for (const v of line.x) if (inside(v)) all.add(v);
  const sorted = [...all].sort((a, b) => a - b);
  const bins = sorted.length > MAX_POINTS;
  const low = sorted[0] ?? 0;
  const width = bins ? (sorted[sorted.length - 1]! - low) / MAX_POINTS : 1;
  const xs = bins ? Array.from({ length: MAX_POINTS + 1 }, (_, i) => low + width * i) : sorted;
  const place = bins ? null : new Map(xs.map((v, i) => [v, i]));
  const columns = lines.map(({ x, y }) => {
    const sums = new Array<number>(xs.length).fill(0);
    const counts = new Array<number>(xs.length).fill(0);
    for (let i = 0; i < x.length; i++) {
      const value = y[i]!;
      if (!inside(x[i]!) || !Number.isFinite(value)) continue;
      const at = place ? place.get(x[i]!)! : Math.round((x[i]! - low) / width);
      sums[at]! += value;
      counts[at]! += 1;
    }
    return sums.map((sum, i) => (counts[i] ? sum / counts[i]! : null));
  });
  return [xs, ...columns];
}
