// One run, or several beside each other: where it stands, curves, scores, settings, answers.

import { useRef, useState } from "preact/hooks";
import { get } from "../api";
import { Failure, usePoll } from "../parts";
import { link } from "../route";
import { Control, Log } from "./control";
import { Head } from "./head";
import { Metrics } from "./series";
import { server } from "./source";
import type { RunFacts } from "./types";
import { RunView } from "./view";

const READ_MS = 2000;
const REDRAW_MS = 1000; // while a long run is read, piece by piece

export function RunPage({ ids, changes }: { ids: string[]; changes: boolean }) {
  const metrics = useRef(new Map(ids.map((id) => [id, new Metrics(id)]))).current;
  const [runs, setRuns] = useState<RunFacts[]>([]);
  const [doubts, setDoubts] = useState<string[]>([]);
  const [version, setVersion] = useState(0);
  const [error, setError] = useState<unknown>(null);
  const told = useRef(""); // what the metrics said of the facts that are shown
  const drawn = useRef(0);
  const draw = (now: boolean) => {
    if (!now && performance.now() - drawn.current < REDRAW_MS) return;
    setVersion((v) => v + 1);
    drawn.current = performance.now();
  };

  usePoll(
    async () => {
      try {
        const known = [...metrics.values()].reduce((sum, m) => sum + m.version, 0);
        await Promise.all([...metrics.values()].map((m) => m.read(() => draw(false))));
        if ([...metrics.values()].reduce((sum, m) => sum + m.version, 0) !== known) draw(true);
        const now = [...metrics.values()].map((m) => m.facts).join();
        if (told.current !== now) {
          const facts = await Promise.all(ids.map((id) => get<RunFacts>("studio/run", { id })));
          if (ids.length > 1) setDoubts((await get<{ doubts: string[] }>("studio/doubts", { ids: ids.join("+") })).doubts);
          setRuns(facts);
          told.current = now;
        }
        setError(null);
      } catch (failed) {
        told.current = ""; // the run may be another one by the time that it can be read again
        setError(failed);
      }
    },
    READ_MS,
    [],
  );

  if (error && runs.length === 0) return <Failure error={error} />;
  if (runs.length === 0) return <p class="note">Reading the run…</p>;
  return (
    <>
      <nav class="crumbs" aria-label="Way back">
        <a href={link("runs")}>Runs</a> <span aria-hidden="true">/</span>
      </nav>
      {runs.map((run) => (
        <Head key={run.id} run={run} metrics={metrics.get(run.id)} version={version} />
      ))}
      {error ? <Failure error={error} /> : null}
      <RunView
        runs={runs}
        metrics={metrics}
        version={version}
        doubts={doubts}
        source={server}
        control={runs.map((run) => (
          <div key={run.id} class="controls-of">
            {changes && <Control run={run} state={metrics.get(run.id)?.state ?? run.state} />}
            {run.logged && <Log ask={{ id: run.id }} name={run.name} />}
          </div>
        ))}
      />
    </>
  );
}
