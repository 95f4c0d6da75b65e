// What is shown of runs, on the page and in a report: variants to show or hide, curves, scores, costs, settings, labels, answers.

import type { ComponentChildren } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Answers } from "./answers";
import { ConfusionMatrix } from "./confusion";
import { Curves } from "./curves";
import { never, soon, spent } from "./frames";
import { Scores } from "./scores";
import type { Metrics } from "./series";
import { Settings } from "./settings";
import type { Source } from "./source";
import { Swatch } from "./swatch";
import { TradeOff } from "./tradeoff";
import type { RunFacts, Shown } from "./types";

interface Props {
  runs: RunFacts[];
  metrics: Map<string, Metrics>;
  version: number;
  doubts: string[];
  source: Source;
  /** Whether scores come before curves: of runs that have ended they are what one looks for. */
  scoresFirst?: boolean;
  /** What can be done with the runs, where something can. */
  control?: ComponentChildren;
}

const MANY = 24; // variants that are found by their names, not by looking

export function RunView({ runs, metrics, version, doubts, source, scoresFirst, control }: Props) {
  const [hidden, setHidden] = useState<Set<number>>(new Set());
  const every = useMemo(() => everyVariant(runs), [runs]);
  const [wanted, setWanted] = useState("");
  const found = every.length > MANY && wanted ? every.filter((s) => s.label.toLowerCase().includes(wanted.trim().toLowerCase())) : every;
  const shown = useMemo(() => every.filter((s) => !hidden.has(s.number)), [every, hidden]);
  const toggle = (n: number) => setHidden(new Set(hidden.has(n) ? [...hidden].filter((x) => x !== n) : [...hidden, n]));
  const curved = useLater(useGrown(version, metrics));
  const scored = useLater(curved);
  // the same elements as long as what they show is the same: then nothing of them is compared when new lines come
  const curves = useMemo(() => <Curves shown={shown} metrics={metrics} version={curved} />, [shown, metrics, curved]);
  const scores = useMemo(() => <Scores shown={shown} runs={runs} metrics={metrics} doubts={doubts} />, [shown, runs, metrics, doubts, scored]);
  const rest = useMemo(
    () => (
      <>
        {doubts.length === 0 && <TradeOff shown={shown} runs={runs} />}
        {runs.map((run) => (
          <ConfusionMatrix key={run.id} run={run} source={source} />
        ))}
        {runs.map((run) => (
          <Answers key={run.id} run={run} shown={every} source={source} />
        ))}
        <Settings shown={shown} runs={runs} />
      </>
    ),
    [shown, every, runs, doubts, source],
  );
  return (
    <>
      {every.length > 1 && (
        <div class="legend" role="group" aria-label="Variants: press one to hide or show it">
          {every.length > MANY && (
            <>
              <input type="search" aria-label="Find variants" placeholder={`Find among ${every.length}`} value={wanted} onInput={(e) => setWanted(e.currentTarget.value)} />
              <button type="button" class="quiet" onClick={() => setHidden(new Set([...hidden, ...found.map((s) => s.number)]))}>
                Hide {found.length === every.length ? "all" : found.length}
              </button>
              <button type="button" class="quiet" onClick={() => setHidden(new Set([...hidden].filter((n) => !found.some((s) => s.number === n))))}>
                Show {found.length === every.length ? "all" : found.length}
              </button>
            </>
          )}
          {found.map((s) => (
            <button key={s.number} type="button" aria-pressed={!hidden.has(s.number)} onClick={() => toggle(s.number)}>
              <Swatch number={s.number} /> {s.label}
            </button>
          ))}
        </div>
      )}
      {scoresFirst && scores}
      {curves}
      {control}
      {!scoresFirst && scores}
      {rest}
    </>
  );
}

function everyVariant(runs: RunFacts[]): Shown[] {
  let count = 0;
  return runs.flatMap((run) =>
    run.variants.map((facts): Shown => ({ number: count++, label: runs.length > 1 ? `${run.name} / ${facts.name}` : facts.name, run, facts })),
  );
}

const GROWN = 1.005;
const OLD_MS = 8000;
const PART = 0.002; // of a core, for our pieces of drawing; the browser takes some five times as much to show them

/** The version once there is so much more than was drawn that it can be seen, or what is drawn is old: half a percent of a long run's lines
 * moves a curve by a few pixels. Training goes on beside the page, maybe on the same cores: drawing that has taken long is not soon done
 * again. */
function useGrown(version: number, metrics: Map<string, Metrics>): number {
  const [drawn, setDrawn] = useState(version);
  const last = useRef({ lines: 0, at: 0, spent });
  useEffect(() => {
    let lines = 0;
    for (const m of metrics.values()) for (const v of m.variants.values()) lines += v.steps.length + v.valid.length;
    const draw = () => {
      last.current = { lines, at: performance.now(), spent };
      setDrawn(version);
    };
    const age = performance.now() - last.current.at;
    const seen = lines < last.current.lines || lines >= GROWN * last.current.lines;
    const wait = seen ? Math.min(OLD_MS, (spent - last.current.spent) / PART) : OLD_MS;
    if (age >= wait) return draw();
    const timer = setTimeout(draw, OLD_MS - age); // sooner it is drawn with the next lines, in the same frame as what else they change
    return () => clearTimeout(timer);
  }, [version]);
  return drawn;
}

/** A number as it was a frame ago, so that what follows from it is not all computed in one. */
function useLater(now: number): number {
  const [later, setLater] = useState(now);
  const owner = useRef({}).current;
  useEffect(() => {
    soon(owner, () => setLater(now));
    return () => never(owner);
  }, [now]);
  return later;
}
