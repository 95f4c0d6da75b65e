// All runs below the folder: a table, from which one opens one run or compares several.

import { useState } from "preact/hooks";
import { get } from "../api";
import { ago, duration, quoted, short } from "../format";
import { type Column, Command, Empty, Failure, Table, usePoll } from "../parts";
import { link } from "../route";
import { Begin } from "./begin";
import { StateMark } from "./state";
import type { RunLine } from "./types";

export function RunList({ changes }: { changes: boolean }) {
  const [found, setFound] = useState<{ root: string; runs: RunLine[]; cut: boolean } | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [chosen, setChosen] = useState<string[]>([]);
  const [wanted, setWanted] = useState("");
  usePoll(
    async () => {
      try {
        setFound(await get("studio/runs"));
        setError(null);
      } catch (failed) {
        setError(failed);
      }
    },
    4000,
    [],
  );
  if (error && !found) return <Failure error={error} />;
  if (!found) return <p class="note">Looking for runs…</p>;
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const runs = found.runs.filter((r) => words.every((w) => `${r.name} ${r.base ?? ""} ${r.methods.join(" ")} ${r.state}`.toLowerCase().includes(w)));
  const still = chosen.filter((id) => found.runs.some((r) => r.id === id));
  const paths = still.map((id) => quoted(found.runs.find((r) => r.id === id)!.path));
  const columns: Column<RunLine>[] = [
    {
      key: "name",
      title: "run",
      cell: (r) => (
        <span class="run-name">
          <label>
            <input
              type="checkbox"
              aria-label={`Compare ${r.name}`}
              checked={still.includes(r.id)}
              onChange={(e) => setChosen(e.currentTarget.checked ? [...still, r.id] : still.filter((id) => id !== r.id))}
            />
          </label>
          <a href={link("runs", r.id)}>{r.name}</a>
        </span>
      ),
    },
    { key: "state", title: "state", cell: (r) => <StateMark state={r.state} /> },
    { key: "base", title: "base", cell: (r) => r.error ?? r.base ?? "–" },
    { key: "methods", title: "methods", cell: (r) => r.methods.join(", ") || "–" },
    { key: "variants", title: "variants", number: true, cell: (r) => r.variants || "–" },
    { key: "tokens", title: "tokens", number: true, cell: (r) => short(r.tokens) },
    { key: "seconds", title: "time", number: true, cell: (r) => duration(r.seconds) },
    { key: "changed", title: "changed", number: true, cell: (r) => ago(r.changed) },
  ];
  return (
    <>
      <div class="page-head">
        <h1>Runs</h1>
        <p class="note path">{found.root}</p>
      </div>
      {error ? <Failure error={error} /> : null}
      {found.cut && (
        <p class="failure" role="note">
          There are too many folders to look at all of them, so runs may be missing here. Open the page on a folder further down.
        </p>
      )}
      {found.runs.length === 0 ? (
        <Empty>
          <p>There is no run folder here yet. This page shows one as soon as training begins.</p>
          <Command text="trimtab train RUN.yaml" />
        </Empty>
      ) : (
        <section class="card" aria-label="Runs">
          <div class="toolbar">
            <label class="grow">
              <span class="hidden">Find runs</span>
              <input type="search" placeholder="Find by name, base, method or state" value={wanted} onInput={(e) => setWanted(e.currentTarget.value)} />
            </label>
            {still.length > 1 ? (
              <a class="button main" href={link("runs", still.join("+"))}>
                Compare {still.length} runs
              </a>
            ) : (
              <span class="note">Tick two or more to compare them.</span>
            )}
          </div>
          <Table label="All runs" columns={columns} rows={runs} rowKey={(r) => r.id} />
          {runs.length === 0 && <p class="note">No run matches.</p>}
          {paths.length > 1 && <Command text={`trimtab compare ${paths.join(" ")}`} says="In a terminal" />}
        </section>
      )}
      {changes && <Begin />}
    </>
  );
}
