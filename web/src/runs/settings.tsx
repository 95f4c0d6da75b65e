// How the variants were made: what differs between them first, everything if asked.

import { useState } from "preact/hooks";
import { value } from "../format";
import { type Column, Section, Table } from "../parts";
import { Name } from "./scores";
import type { RunFacts, Shown } from "./types";

interface Row {
  key: string;
  values: string[];
  differs: boolean;
}

export function Settings({ shown, runs }: { shown: Shown[]; runs: RunFacts[] }) {
  const [all, setAll] = useState(false);
  const own = table(shown.map((s) => s.facts.settings));
  const shared = table(runs.map((r) => ({ ...r.settings, base: r.base, device: r.device, dtype: r.dtype })));
  const differing = own.filter((r) => r.differs || shown.length === 1);
  const rows = all ? own : differing;
  const ofRuns = all || runs.length === 1 ? shared : shared.filter((r) => r.differs);
  const columns: Column<Row>[] = [
    { key: "key", title: "setting", cell: (r) => r.key },
    ...shown.map((s, i): Column<Row> => ({ key: String(s.number), title: s.label, cell: (r) => r.values[i], class: (r) => (r.differs ? "differs" : undefined) })),
  ];
  return (
    <Section
      title="Settings"
      id="settings"
      aside={
        <label class="check">
          <input type="checkbox" checked={all} onChange={(e) => setAll(e.currentTarget.checked)} /> those that are equal too
        </label>
      }
    >
      {shown.length > 1 && (
        <div class="legend-line">
          {shown.map((s) => (
            <Name key={s.number} shown={s} />
          ))}
        </div>
      )}
      {rows.length ? (
        <Table label="Settings of variants" columns={columns} rows={rows} rowKey={(r) => r.key} />
      ) : (
        <p class="note">{own.length ? "All settings of the variants are equal." : "The settings are known once the run has begun."}</p>
      )}
      {ofRuns.length > 0 && (all || runs.length > 1) && (
        <>
          <h3>{runs.length > 1 ? "Of the runs" : "Of the run"}</h3>
          <Table
            label="Settings of runs"
            columns={[
              { key: "key", title: "setting", cell: (r) => r.key },
              ...runs.map((run, i): Column<Row> => ({ key: run.id, title: run.name, cell: (r) => r.values[i] })),
            ]}
            rows={ofRuns}
            rowKey={(r) => r.key}
          />
        </>
      )}
    </Section>
  );
}

function table(settings: Record<string, unknown>[]): Row[] {
  const keys = [...new Set(settings.flatMap((s) => Object.keys(s)))];
  return keys.map((key) => ({
    key,
    values: settings.map((s) => value(s[key])),
    differs: new Set(settings.map((s) => JSON.stringify(s[key] ?? null))).size > 1,
  }));
}
