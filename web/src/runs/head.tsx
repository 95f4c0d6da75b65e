// Where a run stands: its base, how far it is, what it has cost.

import { useMemo } from "preact/hooks";
import { duration, number, own, quoted, short } from "../format";
import { Command, Facts } from "../parts";
import { StateMark } from "./state";
import type { Metrics } from "./series";
import type { RunFacts, State } from "./types";

export function Head({ run, metrics, version }: { run: RunFacts; metrics: Metrics | undefined; version: number }) {
  const going = metrics?.state ?? run.state;
  const far = useMemo(() => progress(run, metrics), [run, version]);
  const state: State = going === "running" && far.paused > 0 && far.training === 0 ? "paused" : going;
  const stopped = run.variants.filter((v) => v.stopped);
  const prints = run.base_fingerprint;
  const facts: [string, string][] = [
    ["base", [run.base ?? "–", run.base_parameters ? short(run.base_parameters) : "", run.dtype ?? "", run.device ?? ""].filter(Boolean).join(" · ")],
    ["tokens", short(run.tokens ?? far.tokens)],
    ["time of the steps", duration(run.seconds ?? far.seconds)],
    ["tokens/s", number(run.tokens_per_s ?? far.rate, 3)],
  ];
  if (run.peak_memory_gb) facts.push(["peak memory", `${number(run.peak_memory_gb, 3)} GB`]);
  if (prints.before) facts.push(["base after training", prints.before === prints.after ? "unchanged" : "CHANGED"]);
  return (
    <header class="run-head">
      <h1>
        {run.name} <StateMark state={state} />
      </h1>
      <Facts look="facts" facts={facts} />
      {state !== "finished" && far.total > 0 && (
        <div class="progress-line">
          <progress max={far.total} value={far.done} aria-label="Steps done" />
          <span class="note">
            {far.done.toLocaleString("en-US")} of {far.total.toLocaleString("en-US")} steps
            {state === "running" && far.left ? `, about ${duration(far.left)} of steps to go` : ""}
            {state === "running" && far.paused ? `, ${far.paused} of ${run.variants.length} variants paused` : ""}
            {state === "paused" ? ". All variants are paused: the run waits" : ""}
          </span>
        </div>
      )}
      {state === "paused" && <Command text={`trimtab runs resume ${quoted(run.path)}`} says="To go on" />}
      {state === "stopped" && <Command text={`trimtab train RUN.yaml --resume   # out: ${quoted(run.path)}`} says="It is not finished. To go on" />}
      {stopped.map((v) => (
        <p key={v.name} class="failure" role="note">
          {v.name} has stopped: {v.stopped}
        </p>
      ))}
    </header>
  );
}

/** How far a run is that has no summary yet, from its metrics: steps of all variants together. paused, training: variants that are not done. */
function progress(run: RunFacts, metrics: Metrics | undefined) {
  const far = { done: 0, total: 0, tokens: 0, seconds: 0, rate: null as number | null, left: 0, paused: 0, training: 0 };
  const { ended = {}, paused: asked = [] } = (run.control as Partial<typeof run.control> | undefined) ?? {}; // a report has none
  for (const v of run.variants) {
    const lines = metrics?.variants.get(v.name)?.steps;
    const done = lines?.column("step").at(-1) ?? 0;
    far.done += done;
    far.total += v.total_steps ?? 0;
    const over = v.stopped !== null || own(ended, v.name) !== undefined || (v.total_steps !== null && done >= v.total_steps);
    const paused = !over && asked.includes(v.name);
    if (!over) far[paused ? "paused" : "training"]++;
    if (!lines || !done) continue;
    const seconds = lines.along("seconds").at(-1)!;
    far.tokens += lines.along("tokens").at(-1)!;
    far.seconds = Math.max(far.seconds, seconds);
    far.rate = lines.column("tokens_per_s").findLast(Number.isFinite) ?? far.rate;
    if (!over && !paused) far.left = Math.max(far.left, ((v.total_steps ?? done) - done) * (seconds / done));
  }
  return far;
}
