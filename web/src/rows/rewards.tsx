// The rewards of `grpo`: built-in ones with their options, and functions of the user's own files.

import { own } from "../format";
import { Choice, Errors, Field, type Fields, put, Text, useFieldId, useWritten } from "./fields";

export interface RewardFacts {
  name: string;
  options: { name: string; needed: boolean }[];
}

const SAYS: Record<string, string> = {
  exact_match: "1 where the answer is the row's own",
  regex: "1 where the pattern is found in the answer",
  json_schema: "1 where the answer is JSON that fits the schema",
  tool_call: "1 where the answer makes the calls of the row's own answer",
  length: "1 within the bounds, less the further away",
};
const HINTS: Record<string, string> = {
  column: "Compare with this column, not with the row's own answer",
  pattern: "A regular expression of Python",
};
const FILE = "a function in a file";

export function startingReward(answered: boolean): Fields {
  return answered ? { reward: "exact_match" } : { reward: "length", max_words: 100 };
}

export function Rewards({ known, value, errors, set }: { known: RewardFacts[]; value: unknown; errors: string[]; set: (rewards: Fields[]) => void }) {
  const rewards = Array.isArray(value) ? (value as Fields[]) : [];
  return (
    <div class="rewards" role="group" aria-label="Rewards">
      <div class="rewards-head">
        <h3>Rewards</h3>
        <button type="button" onClick={() => set([...rewards, { reward: "exact_match" }])}>
          Add a reward
        </button>
      </div>
      <p class="note">Their weighted sum rates an answer.</p>
      {errors.map((text) => (
        <p key={text} class="field-error" role="alert">
          {text}
        </p>
      ))}
      {rewards.map((reward, i) => (
        <OneReward
          key={i}
          number={i + 1}
          known={known}
          reward={reward}
          set={(next) => set(rewards.map((r, j) => (j === i ? next : r)))}
          remove={rewards.length > 1 ? () => set(rewards.filter((_, j) => j !== i)) : undefined}
        />
      ))}
    </div>
  );
}

function OneReward({ number, known, reward, set, remove }: { number: number; known: RewardFacts[]; reward: Fields; set: (next: Fields) => void; remove: (() => void) | undefined }) {
  const name = String(reward["reward"] ?? "");
  const built = known.find((r) => r.name === name);
  const field = (key: string, value: unknown) => set(put(reward, key, value === "" ? undefined : value));
  const weight = reward["weight"] === undefined ? {} : { weight: reward["weight"] };
  return (
    <div class="fields reward" role="group" aria-label={`Reward ${number}`}>
      <Choice
        label="Reward"
        value={built ? name : FILE}
        words={[...known.map((r) => r.name), FILE]}
        errors={[]}
        hint={own(SAYS, name)}
        set={(word) => set({ reward: word === FILE ? "" : word, ...weight })}
      />
      {!built && (
        <>
          <Text label="File and function" value={name} errors={[]} hint="FILE.py:FUNCTION, from the run file's folder" wide set={(text) => set({ ...reward, reward: text })} />
          <div class="field switch">
            <label class="check">
              <input type="checkbox" checked={reward["trusted"] === true} onChange={(e) => field("trusted", e.currentTarget.checked || undefined)} />
              training may run this code
            </label>
          </div>
        </>
      )}
      {built?.options.map((o) =>
        o.name === "schema" ? (
          <Schema key={o.name} value={reward["schema"]} set={(x) => field("schema", x)} />
        ) : o.name.endsWith("_words") ? (
          <Field key={o.name} facts={{ name: o.name, kind: "number", default: null, whole: true }} value={reward[o.name]} errors={[]} set={(x) => field(o.name, x)} />
        ) : (
          <Text key={o.name} label={o.name} value={String(reward[o.name] ?? "")} errors={[]} hint={HINTS[o.name]} set={(x) => field(o.name, x)} />
        ),
      )}
      <Field facts={{ name: "weight", kind: "number", default: 1 }} value={reward["weight"]} errors={[]} set={(x) => field("weight", x)} />
      {remove && (
        <button type="button" class="quiet" onClick={remove} aria-label={`Take reward ${number} away`}>
          Take away
        </button>
      )}
    </div>
  );
}

/** A JSON schema. What is no JSON yet is kept as text, which the run file is refused for. */
function Schema({ value, set }: { value: unknown; set: (value: unknown) => void }) {
  const id = useFieldId();
  const [text, write] = useWritten(value, parsed, (x) => (x === undefined ? "" : typeof x === "string" ? x : JSON.stringify(x)));
  const wrong = typeof value === "string" ? ["This is no JSON object yet"] : [];
  return (
    <div class="field wide">
      <label for={id}>schema</label>
      <textarea
        id={id}
        rows={3}
        spellcheck={false}
        value={text}
        placeholder={'{"type": "object", "required": ["answer"]}'}
        aria-invalid={wrong.length > 0}
        aria-describedby={`${id}-says`}
        onInput={(e) => {
          write(e.currentTarget.value);
          set(parsed(e.currentTarget.value));
        }}
      />
      <Errors id={`${id}-says`} errors={wrong} hint="A JSON schema" />
    </div>
  );
}

function parsed(text: string): unknown {
  if (text === "") return undefined;
  try {
    const found: unknown = JSON.parse(text);
    return typeof found === "object" && found !== null && !Array.isArray(found) ? found : text;
  } catch {
    return text;
  }
}
