// The metrics of a run as they come in, in typed arrays that are appended to, and what is drawn of them.

import { get } from "../api";
import type { Columns, MetricsPart, State } from "./types";

export type Axis = "step" | "tokens" | "seconds";

/** Points of one line of a chart, x ascending; y is NaN where nothing is known. */
export interface Points {
  x: ArrayLike<number>;
  y: ArrayLike<number>;
}

/** A list of numbers that grows at its end. */
class Growing {
  private room = new Float64Array(64);
  length = 0;

  /** What is in it, without a copy. Later pushes do not change it. */
  get view(): Float64Array {
    return this.room.subarray(0, this.length);
  }

  push(value: number): void {
    if (this.length === this.room.length) {
      const larger = new Float64Array(2 * this.room.length);
      larger.set(this.room);
      this.room = larger;
    }
    this.room[this.length++] = value;
  }

  cut(length: number): void {
    this.room = this.room.slice(); // views of before keep what they showed
    this.length = length;
  }
}

interface Smooth {
  weight: number;
  values: Growing;
  sum: number;
  norm: number;
}

/** Rows of one variant, columns by field. A field that came late is NaN before. */
export class Lines {
  private columns = new Map<string, Growing>();
  private sums = new Map<Axis, Growing>();
  private smooth = new Map<string, Smooth>();
  length = 0;

  get fields(): string[] {
    return [...this.columns.keys()];
  }

  column(field: string): Float64Array {
    return this.columns.get(field)?.view ?? new Float64Array();
  }

  /** Appends. Steps that are there already are said anew: what came from the first of them on is replaced. */
  add(more: Columns): void {
    const steps = more["step"];
    const first = steps?.[0];
    if (!steps || first === undefined || first === null) return;
    const known = this.column("step");
    let keep = this.length;
    while (keep > 0 && known[keep - 1]! >= first) keep--;
    if (keep < this.length) {
      for (const column of this.columns.values()) column.cut(keep);
      this.sums.clear();
      this.smooth.clear();
    }
    for (const field of Object.keys(more)) {
      if (this.columns.has(field)) continue;
      const column = new Growing();
      for (let i = 0; i < keep; i++) column.push(NaN);
      this.columns.set(field, column);
    }
    for (const [field, column] of this.columns) {
      const values = more[field];
      for (let i = 0; i < steps.length; i++) column.push(values?.[i] ?? NaN);
    }
    this.length = keep + steps.length;
  }

  /** The axis' value of each line: its step, or the tokens or seconds up to it. Where not every step is logged, a line counts for those
   * that it stands for. */
  along(axis: Axis): Float64Array {
    const steps = this.column("step");
    if (axis === "step") return steps;
    let sums = this.sums.get(axis);
    if (!sums) this.sums.set(axis, (sums = new Growing()));
    const each = this.column(axis);
    let sum = sums.view.at(-1) ?? 0;
    for (let i = sums.length; i < steps.length; i++) {
      const more = each[i] ?? NaN;
      sum += Number.isNaN(more) ? 0 : more * Math.max(1, steps[i]! - (steps[i - 1] ?? 0));
      sums.push(sum);
    }
    return sums.view;
  }

  /** A column's exponential moving average without the bias of its start; what is not known stays out. Goes on from where it was. */
  smoothed(field: string, weight: number): Float64Array {
    const values = this.column(field);
    if (weight <= 0) return values;
    let made = this.smooth.get(field);
    if (made?.weight !== weight) this.smooth.set(field, (made = { weight, values: new Growing(), sum: 0, norm: 0 }));
    for (let i = made.values.length; i < values.length; i++) {
      const value = values[i]!;
      if (Number.isFinite(value)) {
        made.sum = weight * made.sum + (1 - weight) * value;
        made.norm = weight * made.norm + (1 - weight);
      }
      made.values.push(Number.isFinite(value) ? made.sum / made.norm : value);
    }
    return made.values.view;
  }
}

export class Variant {
  readonly steps = new Lines();
  readonly valid = new Lines();
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

  /** Takes lines in. */
  add(variants: MetricsPart["variants"]): void {
    for (const [name, kinds] of Object.entries(variants)) {
      let mine = this.variants.get(name);
      if (!mine) this.variants.set(name, (mine = new Variant()));
      mine.steps.add(kinds.steps);
      mine.valid.add(kinds.valid);
    }
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
      this.add(part.variants);
      if (changed) {
        this.version++;
        onPart();
      }
      if (!part.more) return;
    }
  }
}

/** Where on an axis a step is. */
export function placeOf(step: number, lines: Lines, x: ArrayLike<number>): number | null {
  const steps = lines.column("step");
  const at = firstFrom(steps, step);
  return at < steps.length ? x[at]! : (x[steps.length - 1] ?? null);
}

/** The first place whose value is no less. */
function firstFrom(values: ArrayLike<number>, wanted: number): number {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle]! < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

export type Aligned = [Float64Array, ...(number | null)[][]];

/** All lines over one list of x, as the chart wants them. Where a line has more points than two for each of `bins` parts of the axis (its
 * pixels), the lowest and the highest of each part are drawn, in the order in which they come: a screen shows no more, and no spike is lost. */
export function aligned(lines: Points[], range: [number, number] | null, bins: number): Aligned {
  const parts = lines.map(({ x }): [number, number] => (range ? [firstFrom(x, range[0]), firstFrom(x, range[1])] : [0, x.length]));
  const most = parts.reduce((a, [from, to]) => Math.max(a, to - from), 0);
  return most <= 2 * bins ? exact(lines, parts) : binned(lines, parts, bins);
}

function exact(lines: Points[], parts: [number, number][]): Aligned {
  const xs = union(lines, parts);
  const columns = lines.map(({ x, y }, n) => {
    const column = new Array<number | null>(xs.length).fill(null);
    let at = 0;
    for (let [i, to] = parts[n]!; i < to; i++) {
      while (xs[at]! < x[i]!) at++;
      if (Number.isFinite(y[i]!)) column[at] = y[i]!;
    }
    return column;
  });
  return [xs, ...columns];
}

/** Every x of the lines once, ascending. */
function union(lines: Points[], parts: [number, number][]): Float64Array {
  let all = new Float64Array();
  lines.forEach(({ x }, n) => {
    const [from, to] = parts[n]!;
    let known = to - from === all.length;
    for (let i = from; known && i < to; i++) known = x[i] === all[i - from];
    if (known) return; // as most are: the same steps
    const both = new Float64Array(all.length + to - from);
    both.set(all);
    for (let i = from; i < to; i++) both[all.length + i - from] = x[i]!;
    both.sort();
    let count = 0;
    for (let i = 0; i < both.length; i++) if (!count || both[i] !== both[count - 1]) both[count++] = both[i]!;
    all = both.slice(0, count);
  });
  return all;
}

function binned(lines: Points[], parts: [number, number][], bins: number): Aligned {
  let low = Infinity;
  let high = -Infinity;
  lines.forEach(({ x }, n) => {
    const [from, to] = parts[n]!;
    if (to === from) return;
    low = Math.min(low, x[from]!);
    high = Math.max(high, x[to - 1]!);
  });
  const width = (high - low) / bins || 1;
  const xs = Float64Array.from({ length: 2 * bins }, (_, i) => low + (width * i) / 2);
  xs[2 * bins - 1] = high; // the axis ends where the lines do
  const columns = lines.map(({ x, y }, n) => {
    const column = new Array<number | null>(2 * bins).fill(null);
    const [from, to] = parts[n]!;
    let bin = -1;
    let [least, most, first, last] = [Infinity, -Infinity, 0, 0];
    const close = () => {
      if (bin < 0 || least > most) return;
      column[2 * bin] = first <= last ? least : most;
      if (least !== most || bin === bins - 1) column[2 * bin + 1] = first <= last ? most : least;
    };
    for (let i = from; i < to; i++) {
      const value = y[i]!;
      const at = Math.min(bins - 1, Math.floor((x[i]! - low) / width));
      if (at !== bin) {
        close();
        bin = at;
        [least, most] = [Infinity, -Infinity];
      }
      if (value < least && value > -Infinity) [least, first] = [value, i];
      if (value > most && value < Infinity) [most, last] = [value, i];
    }
    close();
    return column;
  });
  return [xs, ...columns];
}
