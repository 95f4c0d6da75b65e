// Draws the lines of a chart, some in each frame. Where the browser has no graphics card to draw with, 32 lines at once would hold the page
// up for many frames.

import type uPlot from "uplot";
import { never, soon } from "./frames";

export interface Line {
  values: (number | null)[];
  stroke: string;
  width: number;
  dash: number[];
}

const BUDGET_MS = 5; // of a frame
const NEAR = 0.02; // of an axis: by so much it may have moved under the lines of before while new ones are drawn

export class Painter {
  private shown = document.createElement("canvas");
  private next = document.createElement("canvas");
  private fits: number[] = []; // where the axes were when `shown` was drawn
  private flushed = document.createElement("canvas").getContext("2d")!;

  constructor(private plot: uPlot) {}

  /** Draws lines anew; `xs` are theirs. */
  paint(xs: ArrayLike<number>, lines: Line[]): void {
    const { width, height } = this.plot.ctx.canvas;
    this.next.width = width; // which also empties it
    this.next.height = height;
    this.go(xs, lines, 0);
  }

  /** Puts what is drawn into the chart; for its `draw` hook. */
  show(): void {
    const { width, height } = this.plot.ctx.canvas;
    if (this.shown.width !== width || this.shown.height !== height || !near(this.fits, this.axes())) return;
    this.plot.ctx.drawImage(this.shown, 0, 0);
  }

  end(): void {
    never(this);
  }

  private go(xs: ArrayLike<number>, lines: Line[], from: number): void {
    const { width, height } = this.plot.ctx.canvas;
    if (this.next.width !== width || this.next.height !== height) return; // its size has changed: it will be filled again
    const context = this.next.getContext("2d")!;
    const { left, top, width: wide, height: high } = this.plot.bbox;
    context.save();
    context.beginPath();
    context.rect(left, top - 1, wide, high + 2);
    context.clip();
    const until = performance.now() + BUDGET_MS;
    let at = from;
    do {
      if (at < lines.length) this.draw(context, xs, lines[at]!);
      this.flushed.drawImage(this.next, 0, 0, 1, 1, 0, 0, 1, 1); // else all of it would be drawn at the end, in one frame
      at++;
    } while (at < lines.length && performance.now() < until);
    context.restore();
    if (at < lines.length) return soon(this, () => this.go(xs, lines, at));
    [this.shown, this.next] = [this.next, this.shown];
    this.fits = this.axes();
    this.plot.redraw(false, false);
  }

  private draw(context: CanvasRenderingContext2D, xs: ArrayLike<number>, line: Line): void {
    const { plot } = this;
    const ratio = devicePixelRatio;
    let count = 0;
    let [x, y] = [0, 0];
    context.beginPath();
    for (let i = 0; i < xs.length; i++) {
      const value = line.values[i];
      if (value === null || value === undefined) continue;
      [x, y] = [plot.valToPos(xs[i]!, "x", true), plot.valToPos(value, "y", true)];
      if (count++) context.lineTo(x, y);
      else context.moveTo(x, y);
    }
    if (count === 1) context.arc(x, y, 2 * ratio, 0, 2 * Math.PI);
    context.strokeStyle = line.stroke;
    context.lineWidth = (count === 1 ? 3 : line.width) * ratio;
    context.lineJoin = "bevel"; // round joins of so many points take much longer, and look the same
    context.setLineDash(line.dash.map((d) => d * ratio));
    context.stroke();
  }

  private axes(): number[] {
    const { x, y } = this.plot.scales;
    return [x!.min ?? 0, x!.max ?? 0, y!.min ?? 0, y!.max ?? 0];
  }
}

function near(a: number[], b: number[]): boolean {
  return a.length === b.length && [0, 2].every((i) => [0, 1].every((k) => Math.abs(a[i + k]! - b[i + k]!) <= NEAR * Math.abs(b[i + 1]! - b[i]!)));
}
