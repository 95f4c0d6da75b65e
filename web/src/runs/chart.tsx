// One chart over uPlot: lines of variants, rings of validations, a diamond at the kept step. Drag to zoom, double click or Escape to see
// all, arrow keys to read values.

import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { number } from "../format";
import { colour, dash, onSchemeChange, themed } from "./colours";
import { never, soon } from "./frames";
import { type Line, Painter } from "./painter";
import { type Aligned, aligned, type Points } from "./series";
import { Swatch } from "./swatch";

export interface Curve {
  number: number;
  label: string;
  line: Points;
  raw?: Points;
  rings?: Points;
  kept?: { x: number; y: number };
}

export type Range = [number, number] | null;

interface Props {
  title: string;
  xTitle: string;
  curves: Curve[];
  range: Range;
  onRange: (range: Range) => void;
  log?: boolean;
  height: number;
  group: string;
  legend?: boolean;
}

interface Read {
  left: number;
  top: number;
  x: number;
  rows: { number: number; label: string; value: number; valid: boolean }[];
}

const MAX_ROWS = 10;

export function Chart({ title, xTitle, curves, range, onRange, log, height, group, legend }: Props) {
  const holder = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const painter = useRef<Painter | null>(null);
  const [read, setRead] = useState<Read | null>(null);
  const [look, setLook] = useState(0);
  useEffect(() => onSchemeChange(() => setLook((n) => n + 1)), []);

  // the same series as long as the same curves with the same parts are shown: then only data are set
  const shape = JSON.stringify([look, log, height, title, xTitle, curves.map((c) => [c.number, c.label, !!c.raw, !!c.rings])]);
  const latest = useRef<Latest>({ curves, data: [new Float64Array()], onRange });
  latest.current.curves = curves;
  latest.current.onRange = onRange;
  const latestShape = useRef(shape);
  latestShape.current = shape;
  const madeAs = useRef("");
  const inSight = useRef(false);
  const drawn = useRef(true); // whether what is shown is the newest
  // a chart's turn comes in a frame of its own, and only while it can be seen
  const fill = () => {
    const made = plot.current;
    if (!made || madeAs.current !== latestShape.current) return; // it is about to be made anew, with other series
    drawn.current = true;
    const { curves: now } = latest.current;
    const parts = Math.max(100, Math.round((made.width - 60) / 2)); // of two pixels: a line is as wide
    const data = aligned(lines(now), latestRange.current, parts);
    latest.current.data = data;
    made.setData(data as uPlot.AlignedData, true);
    const own = painter.current!; // by its turn there may be another, of other curves
    soon(own, () => own.paint(data[0], painted(now, data)));
  };
  const latestRange = useRef(range);
  latestRange.current = range;
  const refill = () => {
    drawn.current = false;
    if (inSight.current) soon(drawn, fill);
  };

  useEffect(() => {
    const box = holder.current!;
    const look = { title, xTitle, log: !!log, height, group, width: box.clientWidth || 300 };
    const options = optionsOf(look, latest, setRead, () => painter.current?.show());
    latest.current.data = [new Float64Array(), ...lines(curves).map(() => [])];
    const made = new uPlot(options, latest.current.data as uPlot.AlignedData, box);
    plot.current = made;
    madeAs.current = shape;
    painter.current = new Painter(made);
    refill();
    const sized = new ResizeObserver(() => {
      if (!box.clientWidth || box.clientWidth === made.width) return;
      made.setSize({ width: box.clientWidth, height });
      refill();
    });
    const watched = new IntersectionObserver((entries) => {
      inSight.current = entries.at(-1)!.isIntersecting;
      if (inSight.current && !drawn.current) soon(drawn, fill);
    });
    sized.observe(box);
    watched.observe(box);
    return () => {
      sized.disconnect();
      watched.disconnect();
      never(drawn);
      painter.current!.end();
      painter.current = null;
      made.destroy();
      plot.current = null;
      setRead(null);
    };
  }, [shape, group]);

  useEffect(refill, [curves, range]);

  const onKey = (event: KeyboardEvent) => {
    const made = plot.current;
    if (!made) return;
    if (!drawn.current) fill(); // the keyboard comes before the next frame
    const xs = latest.current.data[0];
    if (xs.length === 0) return;
    const at = made.cursor.idx ?? xs.length - 1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: xs.length - 1, PageUp: at - 20, PageDown: at + 20 }[event.key];
    if (event.key === "Escape") onRange(null);
    if (to === undefined) return;
    event.preventDefault();
    const next = Math.min(xs.length - 1, Math.max(0, to));
    made.setCursor({ left: made.valToPos(xs[next]!, "x"), top: made.over.clientHeight / 2 }, true);
  };

  return (
    <figure class="chart">
      <figcaption>
        {title}
        {legend &&
          curves.map((c) => (
            <span key={c.number} class="variant">
              <Swatch number={c.number} /> {c.label}
            </span>
          ))}
      </figcaption>
      <div
        class="plot"
        ref={holder}
        tabIndex={0}
        role="application"
        aria-roledescription="chart"
        aria-label={`${title}. ${said(curves)} Arrow keys read values, Escape shows all.`}
        onKeyDown={onKey}
        onBlur={() => plot.current?.setCursor({ left: -10, top: -10 }, true)}
      />
      {read && <Tip read={read} xTitle={xTitle} />}
    </figure>
  );
}

function Tip({ read, xTitle }: { read: Read; xTitle: string }) {
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    // placed by script, as the policy allows no style in markup
    const tip = box.current!;
    const room = tip.parentElement!.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, read.left + 14 > room ? read.left - tip.offsetWidth - 14 : read.left + 14))}px`;
    tip.style.top = `${Math.max(0, read.top + 12)}px`;
  });
  return (
    <div class="tip" ref={box} role="status">
      <div class="tip-x">
        {xTitle} {number(xTitle === "step" ? Math.round(read.x) : read.x)}
      </div>
      {read.rows.slice(0, MAX_ROWS).map((r) => (
        <div class="tip-row" key={`${r.number} ${r.valid}`}>
          {r.valid ? <Ring number={r.number} /> : <Swatch number={r.number} />}
          <span class="tip-name">
            {r.label}
            {r.valid ? " · valid" : ""}
          </span>
          <span class="tip-value">{number(r.value)}</span>
        </div>
      ))}
      {read.rows.length > MAX_ROWS && <div class="tip-x">and {read.rows.length - MAX_ROWS} more</div>}
    </div>
  );
}

function Ring({ number: n }: { number: number }) {
  return (
    <svg class="ring" viewBox="0 0 10 10" aria-hidden="true">
      <circle cx="5" cy="5" r="3.4" fill="none" stroke={colour(n)} stroke-width="2" />
    </svg>
  );
}

function said(curves: Curve[]): string {
  const last = curves.slice(0, 6).map((c) => `${c.label} ends at ${number(lastOf(c), 3)}`);
  return `${curves.length} ${curves.length === 1 ? "line" : "lines"}${last.length ? `: ${last.join(", ")}` : ""}.`;
}

/** The last value as it was measured, not smoothed. */
function lastOf(curve: Curve): number {
  const { y } = curve.raw ?? curve.line;
  for (let i = y.length - 1; i >= 0; i--) if (Number.isFinite(y[i])) return y[i]!;
  return NaN;
}

/** The order of the chart's series: raw lines behind, then lines, then rings. */
function lines(curves: Curve[]): Points[] {
  return [...curves.flatMap((c) => (c.raw ? [c.raw] : [])), ...curves.map((c) => c.line), ...curves.flatMap((c) => (c.rings ? [c.rings] : []))];
}

/** How the painter draws them: raw lines and lines. */
function painted(curves: Curve[], data: Aligned): Line[] {
  const raw = curves.filter((c) => c.raw).map((c): Omit<Line, "values"> => ({ stroke: `${colour(c.number)}40`, width: 1, dash: [] }));
  const main = curves.map((c): Omit<Line, "values"> => ({ stroke: colour(c.number), width: 1.75, dash: dash(c.number) }));
  return [...raw, ...main].map((line, i) => ({ ...line, values: data[i + 1] as (number | null)[] }));
}

interface Look {
  title: string;
  xTitle: string;
  log: boolean;
  height: number;
  width: number;
  group: string;
}

interface Latest {
  curves: Curve[];
  data: Aligned;
  onRange: (range: Range) => void;
}

function optionsOf(look: Look, latest: { current: Latest }, tell: (read: Read | null) => void, show: () => void): uPlot.Options {
  const curves = latest.current.curves;
  const [ink, rule, surface] = [themed("--soft"), themed("--rule"), themed("--card")];
  const font = "11px system-ui, sans-serif";
  const unseen = curves.flatMap((c) => (c.raw ? [{}, {}] : [{}])).map(() => ({ paths: () => null, points: { show: false } })); // the painter's
  const rings = curves
    .filter((c) => c.rings)
    .map((c) => ({
      stroke: `${colour(c.number)}90`,
      width: 1,
      dash: [2, 4],
      spanGaps: true,
      points: { show: true, size: 7, width: 1.6, stroke: colour(c.number), fill: surface },
    }));
  return {
    width: look.width,
    height: look.height,
    legend: { show: false },
    padding: [8, 18, 0, 0],
    cursor: {
      sync: { key: look.group, setSeries: false },
      drag: { x: true, y: false, setScale: false },
      points: { show: false },
      y: false,
      bind: {
        dblclick: () => () => {
          latest.current.onRange(null);
          return null;
        },
      },
    },
    scales: { x: { time: false }, y: look.log ? { distr: 3 } : { range: (_, low, high) => (low === null || (low === 0 && high === 0) ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true)) } },
    axes: [
      { stroke: ink, font, grid: { show: false }, ticks: { stroke: rule, size: 4 }, incrs: WHOLE, size: 26, gap: 4, values: (_, ticks) => ticks.map(tick), space: 60 },
      {
        stroke: ink,
        font,
        grid: { stroke: rule, width: 1, ...(look.log ? { filter: decades } : {}) },
        ticks: { show: false },
        size: (_, values) => Math.max(36, 10 + 6.5 * Math.max(0, ...(values ?? []).map((v) => v.length))),
        gap: 6,
        values: (_, ticks) => ticks.map((t) => (t === null ? "" : tick(t))),
        space: 34,
      },
    ],
    series: [{}, ...unseen, ...rings],
    hooks: {
      setSelect: [
        (u) => {
          const { left, width } = u.select;
          if (width > 4) latest.current.onRange([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        },
      ],
      setCursor: [(u) => tell(reading(u, latest))],
      drawAxes: [show],
      draw: [(u) => diamonds(u, latest.current.curves)],
    },
  };
}

/** Between marks of the axis below: steps, tokens and seconds are told in whole numbers. */
const WHOLE = Array.from({ length: 13 }, (_, power) => [1, 2, 5].map((n) => n * 10 ** power)).flat();

/** On a logarithmic axis a line for each power of ten is enough. */
function decades(_: uPlot, splits: number[]): (number | null)[] {
  const whole = splits.map((v) => (Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-6 ? v : null));
  return whole.some((v) => v !== null) ? whole : splits;
}

function tick(value: number | null): string {
  if (value === null) return "";
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(".0", "");
  return String(Number(value.toPrecision(4)));
}

/** Values at the cursor; only of the chart under the pointer or with the focus, while the others show the line. */
function reading(u: uPlot, latest: { current: Latest }): Read | null {
  const { left, top, idx } = u.cursor;
  const focused = document.activeElement === u.root.parentElement || u.root.matches(":hover");
  if (!focused || idx === null || idx === undefined || left === undefined || left < 0) return null;
  const { curves, data } = latest.current;
  const rawCount = curves.filter((c) => c.raw).length;
  const ringed = curves.filter((c) => c.rings);
  const rows: Read["rows"] = [];
  curves.forEach((c, i) => {
    const value = data[1 + rawCount + i]?.[idx];
    if (typeof value === "number") rows.push({ number: c.number, label: c.label, value, valid: false });
  });
  ringed.forEach((c, i) => {
    const value = data[1 + rawCount + curves.length + i]?.[idx];
    if (typeof value === "number") rows.push({ number: c.number, label: c.label, value, valid: true });
  });
  rows.sort((a, b) => b.value - a.value);
  const x = data[0]?.[idx];
  return typeof x === "number" && rows.length ? { left: left + u.over.offsetLeft, top: (top ?? 0) + u.over.offsetTop + 20, x, rows } : null;
}

function diamonds(u: uPlot, curves: Curve[]): void {
  const ratio = devicePixelRatio;
  const { ctx, bbox } = u;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left - 8 * ratio, bbox.top - 8 * ratio, bbox.width + 16 * ratio, bbox.height + 16 * ratio);
  ctx.clip();
  for (const c of curves) {
    if (!c.kept) continue;
    const [x, y] = [u.valToPos(c.kept.x, "x", true), u.valToPos(c.kept.y, "y", true)];
    const r = 6 * ratio;
    ctx.beginPath();
    ctx.moveTo(x, y - r);
    ctx.lineTo(x + r, y);
    ctx.lineTo(x, y + r);
    ctx.lineTo(x - r, y);
    ctx.closePath();
    ctx.fillStyle = colour(c.number);
    ctx.fill();
    ctx.lineWidth = 2 * ratio;
    ctx.strokeStyle = themed("--card");
    ctx.stroke();
  }
  ctx.restore();
}
