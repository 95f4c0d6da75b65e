// Which labels are taken for which: the pairs that are mistaken most, and the matrix, labels with the most mistakes first.

import { useEffect, useMemo, useState } from "preact/hooks";
import { own } from "../format";
import { Failure, Options, Section } from "../parts";
import type { Confusion, Source } from "./source";
import { answeredSets, type RunFacts } from "./types";

const FEW = 15; // labels whose matrix is shown without being asked for
const PAIRS = 12;

interface Mistake {
  is: string;
  said: string;
  count: number;
}

interface Told {
  labels: number[];
  counts: Map<string, number>;
  rows: number[];
  right: number;
  total: number;
  mistaken: number[];
  others: boolean;
  mistakes: Mistake[];
}

export function ConfusionMatrix({ run, source }: { run: RunFacts; source: Source }) {
  const sets = answeredSets(run);
  const [found, setFound] = useState<[string, Confusion][]>([]);
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    let over = false;
    Promise.all(sets.map(async (data) => [data, await source.confusion(run.id, data)] as const)).then(
      (all) => !over && setFound(all.flatMap(([data, c]) => (c ? [[data, c]] : []))),
      (failed: unknown) => !over && setError(failed),
    );
    return () => {
      over = true;
    };
  }, [run.id, sets.join("\n")]);
  if (error) return <Failure error={error} />;
  return (
    <>
      {found.map(([data, confusion]) => (
        <OneSet key={data} id={`confusion-${run.id}-${data}`} title={`Labels of ${data}`} confusion={confusion} names={(run.answers[data] ?? []).filter((n) => own(confusion.of, n))} />
      ))}
    </>
  );
}

function OneSet({ id, title, confusion, names }: { id: string; title: string; confusion: Confusion; names: string[] }) {
  const [chosen, setChosen] = useState("");
  const [all, setAll] = useState(false);
  const who = names.includes(chosen) ? chosen : (names.find((n) => n !== "base") ?? names[0]!);
  const told = useMemo(() => tell(confusion, who), [confusion, who]);
  const shown = all || told.labels.length <= FEW ? told.labels : told.labels.slice(0, FEW);
  const heading = `${id}-title`;
  return (
    <Section
      title={title}
      id={heading}
      aside={
        <div class="controls">
          <label class="pick">
            <span>Of</span>
            <select aria-label={`${title}: of`} value={who} onChange={(e) => setChosen(e.currentTarget.value)}>
              <Options words={names} />
            </select>
          </label>
        </div>
      }
    >
      <p class="note">
        {who} gives {told.right} of {told.total} rows their label. {told.mistakes.length === 0 ? "None is mistaken." : "Mistaken most:"}
      </p>
      {told.mistakes.length > 0 && (
        <ol class="mistakes">
          {told.mistakes.slice(0, PAIRS).map((m) => (
            <li key={`${m.is}\n${m.said}`}>
              <span class="count">{m.count}×</span>
              <span>
                <b>{m.is}</b> <span class="note">taken for</span> <b>{m.said}</b>
              </span>
            </li>
          ))}
        </ol>
      )}
      {told.mistakes.length > PAIRS && <p class="note">and {told.mistakes.length - PAIRS} more pairs.</p>}
      <Matrix title={title} who={who} confusion={confusion} told={told} shown={shown} />
      {told.labels.length > FEW && (
        <button type="button" aria-pressed={all} onClick={() => setAll(!all)}>
          {all ? `The ${FEW} labels with the most mistakes` : `All ${told.labels.length} labels`}
        </button>
      )}
    </Section>
  );
}

/** Rows are what is right, columns what was said. Columns have their row's number: names of 77 labels fit into no line. */
function Matrix({ title, who, confusion, told, shown }: { title: string; who: string; confusion: Confusion; told: Told; shown: number[] }) {
  const most = Math.max(1, ...[...told.counts].filter(([key]) => key.split(" ")[0] !== key.split(" ")[1]).map(([, n]) => n));
  const columns: (number | null)[] = told.others ? [...shown, null] : shown;
  return (
    <>
      <p class="note">
        Rows: the right label, those with the most mistakes first. Columns: the label that was given, by the number of its row
        {told.others ? "; the last column counts answers that are no label" : ""}.
        {shown.length < told.labels.length ? " Labels that are not shown have no column here." : ""}
      </p>
      <div class="matrix" role="region" aria-label={`${title}: matrix of ${who}`} tabIndex={0}>
        <table>
          <thead>
            <tr>
              <th scope="col">label</th>
              <th scope="col" class="number">
                right
              </th>
              {columns.map((c, i) => (
                <th key={c} scope="col" title={c === null ? "no label" : confusion.labels[c]}>
                  {c === null ? "none" : i + 1}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {shown.map((r, i) => {
              const right = told.counts.get(`${r} ${r}`) ?? 0;
              return (
                <tr key={r}>
                  <th scope="row">
                    <span class="count">{i + 1}</span> {confusion.labels[r]}
                  </th>
                  <td class="number">
                    {right} of {told.rows[r] ?? 0}
                  </td>
                  {columns.map((c) => {
                    const n = told.counts.get(`${r} ${c}`) ?? 0;
                    const heat = r === c ? "diagonal" : n ? `heat-${Math.ceil((4 * n) / most)}` : "";
                    return (
                      <td key={c} class={heat} title={n ? `${n}: ${confusion.labels[r]} taken for ${c === null ? "no label" : confusion.labels[c]}` : undefined}>
                        {n || ""}
                      </td>
                    );
                  })}
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
    </>
  );
}

function tell(confusion: Confusion, who: string): Told {
  const n = confusion.labels.length;
  const told: Told = { labels: [], counts: new Map(), rows: new Array<number>(n).fill(0), right: 0, total: 0, mistaken: new Array<number>(n).fill(0), others: false, mistakes: [] };
  for (const [is, said, count] of own(confusion.of, who) ?? []) {
    told.counts.set(`${is} ${said}`, count);
    told.rows[is]! += count;
    told.total += count;
    if (is === said) {
      told.right += count;
      continue;
    }
    told.mistaken[is]! += count;
    if (said === null) told.others = true;
    else told.mistaken[said]! += count;
    told.mistakes.push({ is: confusion.labels[is]!, said: said === null ? "something that is no label" : confusion.labels[said]!, count });
  }
  told.mistakes.sort((a, b) => b.count - a.count);
  told.labels = confusion.labels.map((_, i) => i).sort((a, b) => told.mistaken[b]! - told.mistaken[a]! || a - b);
  return told;
}
