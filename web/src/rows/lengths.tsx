// How long rows are, as bars; those beyond max_length, which are dropped, in another colour, with the cut between.

import { number } from "../format";
import type { LengthFacts } from "./types";

const [WIDTH, HEIGHT] = [640, 150];

export function Lengths({ facts, rows }: { facts: LengthFacts; rows: number }) {
  const { kept, over, width, cut } = facts;
  if (kept.length === 0) return <p class="note">There are no rows.</p>;
  const most = Math.max(...kept.map((n, i) => n + over[i]!), 1);
  const end = kept.length * width;
  const bar = WIDTH / kept.length;
  const y = (n: number) => (n ? Math.max(2, (n / most) * (HEIGHT - 14)) : 0);
  const lost = over.reduce((a, b) => a + b, 0);
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(end * part));
  const said = `${number(rows)} rows of at most ${number(cut)} tokens, most of them with ${commonest(kept, width)}${lost ? `; ${number(lost)} longer rows are dropped` : ""}`;
  return (
    <figure class="lengths">
      <div class="lengths-plot">
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label={said}>
        {kept.map((n, i) => {
          const [a, b] = [y(n), y(over[i]!)];
          const told = `${number(i * width + 1)} to ${number((i + 1) * width)} tokens: ${number(n)} rows${over[i] ? `, ${number(over[i])} dropped` : ""}`;
          return (
            <g key={i}>
              <title>{told}</title>
              <rect class="hit" x={i * bar} y={0} width={bar} height={HEIGHT} />
              {n > 0 && <rect class="kept" x={i * bar + 1} y={HEIGHT - a} width={bar - 2} height={a} />}
              {over[i]! > 0 && <rect class="over" x={i * bar + 1} y={HEIGHT - a - b} width={bar - 2} height={b} />}
            </g>
          );
        })}
      </svg>
      <span class="most" aria-hidden="true">
        {number(most)} {most === 1 ? "row" : "rows"}
      </span>
      {cut <= end && (
        <span class="cut" aria-hidden="true" style={{ right: `${100 * (1 - cut / end)}%` }}>
          max_length {number(cut)}
        </span>
      )}
      </div>
      <div class="lengths-ticks" aria-hidden="true">
        {ticks.map((t) => (
          <span key={t}>{number(t)}</span>
        ))}
      </div>
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
