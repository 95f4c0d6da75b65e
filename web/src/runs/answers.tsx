// Held-out rows with what base and variants answered, as bubbles; those first that most variants got wrong.

import { useEffect, useRef, useState } from "preact/hooks";
import { number, own } from "../format";
import { Failure, Options, Section } from "../parts";
import { Name } from "./scores";
import type { Answer, AnswerRow, FoundAnswers, Source } from "./source";
import { turns } from "./turns";
import { answeredSets, type RunFacts, type Shown } from "./types";

const PAGE = 10;

export function Answers({ run, shown, source }: { run: RunFacts; shown: Shown[]; source: Source }) {
  const sets = answeredSets(run);
  const [chosen, setChosen] = useState(sets[0] ?? "");
  const data = sets.includes(chosen) ? chosen : (sets[0] ?? "");
  const [who, setWho] = useState("");
  const [found, setFound] = useState<FoundAnswers | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [busy, setBusy] = useState(false);
  const asked = useRef("");
  const names = run.answers[data] ?? [];

  const load = async (start: number, before: AnswerRow[]) => {
    const mine = JSON.stringify([run.id, data, who]);
    asked.current = mine;
    setBusy(true);
    try {
      const part = await source.answers(run.id, data, names.includes(who) ? who : "", start, PAGE);
      if (asked.current !== mine) return; // others have been asked for by now
      setFound({ ...part, rows: [...before, ...part.rows] });
      setError(null);
    } catch (failed) {
      if (asked.current !== mine) return;
      setError(failed);
    }
    setBusy(false);
  };
  useEffect(() => {
    setFound(null);
    if (data) void load(0, []);
  }, [run.id, data, who]);

  if (!sets.length) return null;
  const title = `Answers${shown.some((s) => s.run.id !== run.id) ? ` of ${run.name}` : ""}`;
  return (
    <Section
      title={title}
      id={`answers-${run.id}`}
      aside={
        <div class="controls">
          {sets.length > 1 && (
            <label class="pick">
              <span>Rows</span>
              <select aria-label="Answers to the rows of" value={data} onChange={(e) => setChosen(e.currentTarget.value)}>
                <Options words={sets} />
              </select>
            </label>
          )}
          <label class="pick">
            <span>Of</span>
            <select aria-label="Answers of" value={names.includes(who) ? who : ""} onChange={(e) => setWho(e.currentTarget.value)}>
              <option value="">all</option>
              <Options words={names} />
            </select>
          </label>
        </div>
      }
    >
      {error ? <Failure error={error} /> : null}
      {found && (
        <p class="note">
          {found.answered ?? found.total} held-out rows, answered greedily, those first that most got wrong. Wrong:{" "}
          {names
            .filter((name) => own(found.wrong, name) !== undefined)
            .map((name) => `${name} ${found.wrong[name]}`)
            .join(", ")}
          .{found.answered ? ` The first ${found.total} are in this file.` : ""}
        </p>
      )}
      {found?.rows.map((row) => <Row key={row.row} row={row} names={names} shown={shown.filter((s) => s.run.id === run.id)} />)}
      {found && found.rows.length < found.total && (
        <button type="button" disabled={busy} onClick={() => void load(found.rows.length, found.rows)}>
          {Math.min(PAGE, found.total - found.rows.length)} more of {found.total - found.rows.length}
        </button>
      )}
    </Section>
  );
}

/** names: in the order in which their answers stand. */
function Row({ row, names, shown }: { row: AnswerRow; names: string[]; shown: Shown[] }) {
  return (
    <article class="answer-row" aria-label={`Row ${row.row + 1}`}>
      <div class="talk">
        {turns(row.prompt).map((turn, i) => (
          <div key={i} class={`bubble ${turn.role === "user" ? "user" : "other"}`}>
            <span class="who">{turn.role}</span>
            <div class="said">{turn.text}</div>
          </div>
        ))}
      </div>
      <dl class="said-list">
        <div class="reference">
          <dt>reference</dt>
          <dd>{row.reference}</dd>
        </div>
        {names.map((name) => {
          const answer = own(row.answers, name);
          if (!answer) return null;
          const variant = shown.find((s) => s.facts.name === name);
          return (
            <div key={name}>
              <dt>
                {variant ? <Name shown={variant} /> : name}
                <Verdict answer={answer} />
              </dt>
              <dd>{answer.text || <em class="note">nothing</em>}</dd>
            </div>
          );
        })}
      </dl>
    </article>
  );
}

function Verdict({ answer }: { answer: Answer }) {
  if (answer.reward !== undefined) return <span class="verdict">reward {number(answer.reward, 3)}</span>;
  if (answer.right === null) return null;
  return <span class={`verdict ${answer.right ? "right" : "wrong"}`}>{answer.right ? "✓ equal" : "✗ differs"}</span>;
}
