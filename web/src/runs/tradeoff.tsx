// What a score costs: a marker for each variant, cost across, score up. Only where there is something to weigh: two variants or more whose
// scores and costs differ.

import { useEffect, useRef, useState } from "preact/hooks";
import { number, short } from "../format";
import { Section } from "../parts";
import { colour, onSchemeChange } from "./colours";
import { compares } from "./scores";
import type { Meaning, RunFacts, Shown } from "./types";

interface Cost {
  key: string;
  title: string;
  of: (s: Shown) => number | null;
  log: boolean;
}

const COSTS: Cost[] = [
  { key: "trainable", title: "trainable parameters", of: (s) => s.facts.trainable, log: true },
  { key: "seconds", title: "own training time, s", of: (s) => s.facts.seconds, log: false },
];
const SHAPES = ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0", "M-4.5-4.5h9v9h-9z", "M0-6 5.5 4.5h-11z", "M0-6.2 6.2 0 0 6.2-6.2 0z"];
const HEIGHT = 280;

interface Dot {
  shown: Shown;
  x: number;
  y: number;
}

export function TradeOff({ shown, runs }: { shown: Shown[]; runs: RunFacts[] }) {
  const meanings = Object.assign({}, ...runs.map((r) => r.scores)) as Record<string, Meaning>;
  const sets = [...new Set(shown.map((s) => s.facts.data ?? "data"))];
  const plots = sets.flatMap((data) => {
    const of = shown.filter((s) => (s.facts.data ?? "data") === data);
    const names = [...new Set(of.flatMap((s) => Object.keys(s.facts.scores)))].filter((n) => meanings[n]?.better && compares(n, of));
    return names.map((score) => ({ data, score, charts: COSTS.flatMap((cost) => weighed(of, score, cost)) })).filter((p) => p.charts.length);
  });
  const scores = [...new Set(plots.map((p) => p.score))].sort((a, b) => Number(!!meanings[b]?.percent) - Number(!!meanings[a]?.percent));
  const [chosen, setChosen] = useState("");
  const score = scores.includes(chosen) ? chosen : scores[0];
  if (score === undefined) return null;
  const title = `${score === "loss" ? "test loss" : (meanings[score]?.title ?? score)}${meanings[score]?.percent ? ", %" : ""}`;
  return (
    <Section
      title="What a score costs"
      id="tradeoff"
      aside={
        scores.length > 1 && (
          <label class="pick">
            <span>Score</span>
            <select value={score} onChange={(e) => setChosen(e.currentTarget.value)}>
              {scores.map((s) => (
                <option key={s} value={s}>
                  {s === "loss" ? "test loss" : (meanings[s]?.title ?? s)}
                </option>
              ))}
            </select>
          </label>
        )
      }
    >
      <div class="charts trades">
        {plots
          .filter((p) => p.score === score)
          .flatMap((p) => p.charts.map(({ cost, dots }) => <Scatter key={`${p.data} ${cost.key}`} title={sets.length > 1 ? `${p.data}: ${title}` : title} cost={cost} dots={dots} />))}
      </div>
    </Section>
  );
}

function weighed(shown: Shown[], score: string, cost: Cost): { cost: Cost; dots: Dot[] }[] {
  const dots = shown.flatMap((s) => {
    const [x, y] = [cost.of(s), s.facts.scores[score]];
    return x && x > 0 && y !== undefined ? [{ shown: s, x, y }] : [];
  });
  return new Set(dots.map((d) => d.x)).size > 1 && new Set(dots.map((d) => d.y)).size > 1 ? [{ cost, dots }] : [];
}

function Scatter({ title, cost, dots }: { title: string; cost: Cost; dots: Dot[] }) {
  const box = useRef<HTMLElement>(null);
  const [width, setWidth] = useState(400);
  const [, again] = useState(0);
  useEffect(() => onSchemeChange(() => again((n) => n + 1)), []);
  useEffect(() => {
    const sized = new ResizeObserver(([entry]) => setWidth(Math.max(240, Math.round(entry!.contentRect.width))));
    sized.observe(box.current!);
    return () => sized.disconnect();
  }, []);
  const scale = cost.log && Math.max(...dots.map((d) => d.x)) / Math.min(...dots.map((d) => d.x)) > 4 ? Math.log10 : (v: number) => v;
  const [left, right, top, bottom] = [52, width - 12, 12, HEIGHT - 40];
  const across = axis(dots.map((d) => scale(d.x)), left + 10, right - 10);
  const up = axis(dots.map((d) => d.y), bottom - 10, top + 8);
  const placed = names(dots.map((d) => ({ d, x: across.at(scale(d.x)), y: up.at(d.y) })), right);
  const said = dots.map((d) => `${d.shown.label}: ${number(d.y)} at ${short(d.x)}`).join("; ");
  return (
    <figure class="chart" ref={box}>
      <figcaption>
        {title} over {cost.title}
        {scale === Math.log10 ? " (log)" : ""}
      </figcaption>
      <svg class="scatter" width={width} height={HEIGHT} role="img" aria-label={`${title} over ${cost.title}. ${said}`}>
        {up.ticks.map((v) => (
          <g key={v}>
            <line x1={left} x2={right} y1={up.at(v)} y2={up.at(v)} />
            <text x={left - 6} y={up.at(v) + 4} text-anchor="end">
              {number(v)}
            </text>
          </g>
        ))}
        {across.ticks.map((v) => (
          <text key={v} x={across.at(v)} y={bottom + 18} text-anchor="middle">
            {short(scale === Math.log10 ? Number((10 ** v).toPrecision(2)) : v)}
          </text>
        ))}
        <text x={(left + right) / 2} y={HEIGHT - 4} text-anchor="middle">
          {cost.title}
        </text>
        {placed.map(({ d, x, y, name }) => (
          <g key={d.shown.number}>
            <title>{`${d.shown.label}: ${number(d.y)}, ${cost.title} ${short(d.x)}`}</title>
            <path d={SHAPES[Math.floor(d.shown.number / 8) % SHAPES.length]} transform={`translate(${x} ${y})`} fill={colour(d.shown.number)} />
            {name && (
              <text class="name" x={name.x} y={name.y} text-anchor={name.anchor}>
                {name.text}
              </text>
            )}
          </g>
        ))}
      </svg>
    </figure>
  );
}

function axis(values: number[], start: number, end: number) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const raw = (high - low) / 4;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw * 0.999)!;
  const ticks: number[] = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
  return { ticks, at: (v: number) => Math.round((start + ((v - low) / (high - low)) * (end - start)) * 10) / 10 };
}

/** Names beside their markers where there is room; the others are in the marker's title. */
function names(dots: { d: Dot; x: number; y: number }[], right: number) {
  const taken = dots.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]);
  return dots.map(({ d, x, y }) => {
    const text = d.shown.label.length > 26 ? `${d.shown.label.slice(0, 25)}…` : d.shown.label;
    const wide = 6.6 * text.length;
    for (const down of [4, -9, 17]) {
      for (const anchor of ["start", "end"] as const) {
        const from = anchor === "start" ? x + 9 : x - 9 - wide;
        const room = [from, y + down - 11, from + wide, y + down + 3];
        if (from < 54 || room[2]! > right || room[1]! < 0) continue;
        if (taken.some((t) => t[0] !== x - 7 || t[1] !== y - 7 ? t[0]! < room[2]! && t[2]! > room[0]! && t[1]! < room[3]! && t[3]! > room[1]! : false)) continue;
        taken.push(room);
        return { d, x, y, name: { x: anchor === "start" ? x + 9 : x - 9, y: y + down, anchor, text } };
      }
    }
    return { d, x, y, name: null };
  });
}
