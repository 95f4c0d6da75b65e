// report.html: what the page shows of runs, in one file. trimtab/train/page.py puts the data in.

import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import { own } from "./format";
import { Head } from "./runs/head";
import { Metrics } from "./runs/series";
import type { AnswerRow, Confusion, FoundAnswers, Source } from "./runs/source";
import type { MetricsPart, RunFacts } from "./runs/types";
import { RunView } from "./runs/view";
import "./style.css";

interface Report {
  version: string;
  made: string;
  runs: RunFacts[];
  metrics: Record<string, MetricsPart["variants"]>;
  thinned: boolean;
  doubts: string[];
  answers: Record<string, Record<string, FoundAnswers>>;
  confusion: Record<string, Record<string, Confusion | null>>;
}

const report = JSON.parse(document.getElementById("data")!.textContent!) as Report;
const metrics = new Map(report.runs.map((run) => [run.id, new Metrics(run.id)]));
for (const [id, mine] of metrics) mine.add(report.metrics[id] ?? {});

const source: Source = {
  async answers(run, data, who, start, count) {
    const found = report.answers[run]![data]!;
    const rows = who ? found.rows.filter((row) => own(row.answers, who)).map((row): AnswerRow => ({ ...row, answers: { [who]: row.answers[who]! } })) : found.rows;
    if (who) rows.sort((a, b) => Number(a.answers[who]!.right !== false) - Number(b.answers[who]!.right !== false));
    const wrong = who ? { [who]: own(found.wrong, who) ?? 0 } : found.wrong;
    return { ...found, rows: rows.slice(start, start + count), total: rows.length, wrong };
  },
  async confusion(run, data) {
    return own(report.confusion[run] ?? {}, data) ?? null;
  },
};

function Page() {
  return (
    <>
      <main class="report">
        {report.runs.map((run) => (
          <Head key={run.id} run={run} metrics={metrics.get(run.id)} version={0} />
        ))}
        <RunView runs={report.runs} metrics={metrics} version={0} doubts={report.doubts} source={source} scoresFirst />
      </main>
      <footer class="bottom">
        Made by trimtab {report.version}, {report.made}. This file loads nothing from anywhere.
        {report.thinned ? " Of long curves it holds the lowest and highest loss of each stretch." : ""}
      </footer>
    </>
  );
}

render(<Page />, document.getElementById("app")!);
