// How long rows are, as bars; those beyond max_length, which are dropped, in another colour, with the cut between.

import { number } from "../format";
import type { LengthFacts } from "./types";

const [WIDTH, HEIGHT, BELOW] = [640, 150, 22];

export function Lengths({ facts, rows }: { facts: LengthFacts; rows: number }) {
  const { kept, over, width, cut } = facts;
  if (kept.length === 0) return <p class="note">There are no rows.</p>;
  const most = Math.max(...kept.map((n, i) => n + over[i]!), 1);
  const end = kept.length * width;
  const x = (tokens: number) => (tokens / end) * WIDTH;
  const bar = WIDTH / kept.length;
  const y = (n: number) => (n ? Math.max(2, (n / most) * (HEIGHT - 14)) : 0);
  const lost = over.reduce((a, b) => a + b, 0);
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(end * part));
  const said = `${number(rows)} rows of at most ${number(cut)} tokens, most of them with ${commonest(kept, width)}${lost ? `; ${number(lost)} longer rows are dropped` : ""}`;
  return (
    <figure class="lengths">
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT + BELOW}`} role="img" aria-label={said}>
        {kept.map((n, i) => {
          const [a, b] = [y(n), y(over[i]!)];
          const told = `${number(i * width + 1)} to ${number((i + 1) * width)} tokens: ${number(n)} rows${over[i] ? `, ${number(over[i])} dropped` : ""}`;
          return (
            <g key={i}>
              <title>{told}</title>
              <rect class="hit" x={i * bar} y={0} width={bar} height={HEIGHT} />
              {n > 0 && <rect class="kept" x={i * bar + 1} y={HEIGHT - a} width={bar - 2} height={a} rx={1.5} />}
              {over[i]! > 0 && <rect class="over" x={i * bar + 1} y={HEIGHT - a - b} width={bar - 2} height={b} rx={1.5} />}
            </g>
          );
        })}
        <line class="axis" x1={0} x2={WIDTH} y1={HEIGHT + 0.5} y2={HEIGHT + 0.5} />
        <text class="tick" x={4} y={11}>
          {number(most)} {most === 1 ? "row" : "rows"}
        </text>
        {cut <= end && (
          <g class="cut">
            <line x1={x(cut)} x2={x(cut)} y1={0} y2={HEIGHT} />
            <text x={x(cut) - 6} y={11} text-anchor="end">
              max_length {number(cut)}
            </text>
          </g>
        )}
        {ticks.map((t, i) => (
          <text key={t} class="tick" x={x(t)} y={HEIGHT + 16} text-anchor={i === 0 ? "start" : i === ticks.length - 1 ? "end" : "middle"}>
            {number(t)}
          </text>
        ))}
      </svg>
      <figcaption class="note">
        Tokens of a row (its longest segment).{" "}
        {lost > 0 ? `${number(lost)} rows are longer than max_length, and dropped.` : cut > end ? `The cut, max_length ${number(cut)}, lies beyond: no row is too long.` : "No row is too long."}
      </figcaption>
    </figure>
  );
}

function commonest(kept: number[], width: number): string {
  const i = kept.indexOf(Math.max(...kept));
  return `${i * width + 1} to ${(i + 1) * width} tokens`;
}
