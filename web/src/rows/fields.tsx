// Fields of a form that is a part of a run file: each with its error or its hint below it.

import { useRef, useState } from "preact/hooks";

export interface FieldFacts {
  name: string;
  kind: "number" | "numbers" | "word" | "switch" | "text" | "list" | "rewards";
  default: unknown;
  words?: string[] | undefined;
  /** It may be a list of its words. */
  several?: boolean;
  whole?: boolean;
  says?: string | undefined;
}

export type Fields = Record<string, unknown>;

/** The fields with one more, or without it where it is what it is by default. */
export function put(fields: Fields, name: string, value: unknown): Fields {
  const { [name]: _, ...rest } = fields;
  return value === undefined ? rest : name in fields ? { ...fields, [name]: value } : { ...rest, [name]: value };
}

/** What is written in a field, while it stands for the field's value ("0." does for 0); else the value, which something else has set. */
export function useWritten(value: unknown, read: (text: string) => unknown, shown: (value: unknown) => string): [string, (text: string) => void] {
  const [text, write] = useState(() => shown(value));
  return [JSON.stringify(read(text)) === JSON.stringify(value) ? text : shown(value), write];
}

let fieldCount = 0;

export function useFieldId(): string {
  const id = useRef("");
  if (!id.current) id.current = `field-${++fieldCount}`;
  return id.current;
}

export function Errors({ id, errors, hint }: { id: string; errors: string[]; hint?: string | undefined }) {
  if (!errors.length && !hint) return null;
  return (
    <span id={id} class={errors.length ? "field-error" : "field-hint"}>
      {errors.length ? errors.join("; ") : hint}
    </span>
  );
}

export function Text({ label, value, errors, hint, list, wide, set }: { label: string; value: string; errors: string[]; hint?: string | undefined; list?: string[] | undefined; wide?: boolean; set: (value: string) => void }) {
  const id = useFieldId();
  return (
    <div class={wide ? "field wide" : "field"}>
      <label for={id}>{label}</label>
      <input
        id={id}
        type="text"
        value={value}
        spellcheck={false}
        autoComplete="off"
        list={list ? `${id}-list` : undefined}
        aria-invalid={errors.length > 0}
        aria-describedby={`${id}-says`}
        onInput={(e) => set(e.currentTarget.value)}
      />
      {list && (
        <datalist id={`${id}-list`}>
          {list.map((x) => (
            <option key={x} value={x} />
          ))}
        </datalist>
      )}
      <Errors id={`${id}-says`} errors={errors} hint={hint} />
    </div>
  );
}

export function Choice({ label, value, words, errors, hint, shown, set }: { label: string; value: string; words: string[]; errors: string[]; hint?: string | undefined; shown?: (word: string) => string; set: (value: string) => void }) {
  const id = useFieldId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      <select id={id} value={value} aria-invalid={errors.length > 0} aria-describedby={`${id}-says`} onChange={(e) => set(e.currentTarget.value)}>
        {words.map((w) => (
          <option key={w} value={w}>
            {shown ? shown(w) : w}
          </option>
        ))}
      </select>
      <Errors id={`${id}-says`} errors={errors} hint={hint} />
    </div>
  );
}

/** A field of a run file. Empty: what it is by default, which the field shows. What is no number is sent as it is, and refused by name. */
export function Field({ facts, value, errors, preset, set }: { facts: FieldFacts; value: unknown; errors: string[]; preset?: string; set: (value: unknown) => void }) {
  const id = useFieldId();
  const name = facts.name;
  if (facts.kind === "switch") {
    return (
      <div class="field switch">
        <label class="check">
          <input type="checkbox" checked={value === undefined ? facts.default === true : value === true} onChange={(e) => set(e.currentTarget.checked === (facts.default === true) ? undefined : e.currentTarget.checked)} />
          {name}
        </label>
        <Errors id={`${id}-says`} errors={errors} />
      </div>
    );
  }
  if (facts.kind === "word" && facts.several) return <Several facts={facts} value={value} errors={errors} set={set} />;
  if (facts.kind === "word") {
    const standard = facts.default === null ? "" : String(facts.default);
    return (
      <Choice
        label={name}
        value={value === undefined ? standard : String(value)}
        words={[...(standard ? [] : [""]), ...(facts.words ?? [])]}
        errors={errors}
        hint={facts.says}
        set={(w) => set(w === standard ? undefined : w)}
      />
    );
  }
  if (facts.kind === "list") return <List facts={facts} value={value} errors={errors} read={wordsOf} set={set} />;
  if (facts.kind === "numbers") return <List facts={facts} value={value} errors={errors} read={numbersOf} set={set} />;
  if (facts.kind === "text") {
    return <Text label={name} value={value === undefined ? String(facts.default ?? "") : String(value)} errors={errors} hint={facts.says} list={facts.words} set={set} />;
  }
  return <NumberField facts={facts} value={value} errors={errors} preset={preset} set={set} />;
}

function NumberField({ facts, value, errors, preset, set }: { facts: FieldFacts; value: unknown; errors: string[]; preset: string | undefined; set: (value: unknown) => void }) {
  const id = useFieldId();
  const [written, write] = useWritten(value, numberOf, (x) => (x === undefined ? "" : String(x)));
  return (
    <div class="field">
      <label for={id}>{facts.name}</label>
      <input
        id={id}
        type="text"
        inputMode="decimal"
        value={written}
        placeholder={preset ?? (facts.default === null ? "" : String(facts.default))}
        autoComplete="off"
        aria-invalid={errors.length > 0}
        aria-describedby={`${id}-says`}
        onInput={(e) => {
          write(e.currentTarget.value);
          set(numberOf(e.currentTarget.value));
        }}
      />
      <Errors id={`${id}-says`} errors={errors} hint={facts.says} />
    </div>
  );
}

function numberOf(written: string): unknown {
  const text = written.trim();
  return text === "" ? undefined : Number.isFinite(Number(text)) ? Number(text) : text;
}

/** One of the words, or more of them, each once. */
function Several({ facts, value, errors, set }: { facts: FieldFacts; value: unknown; errors: string[]; set: (value: unknown) => void }) {
  const words = facts.words ?? [];
  const chosen = Array.isArray(value) ? value.map(String) : [String(value ?? facts.default ?? words[0])];
  const change = (next: string[]) => set(next.length > 1 ? next : next[0] === facts.default ? undefined : next[0]);
  const free = words.find((w) => !chosen.includes(w));
  return (
    <div class="several">
      {chosen.map((word, i) => (
        <div key={i} class="row">
          <Choice
            label={i ? `${facts.name} ${i + 1}` : facts.name}
            value={word}
            words={words.filter((w) => w === word || !chosen.includes(w))}
            errors={i ? [] : errors}
            hint={i ? undefined : facts.says}
            set={(w) => change(chosen.map((old, j) => (j === i ? w : old)))}
          />
          {i > 0 && (
            <button type="button" class="quiet" aria-label={`Take ${word} away`} onClick={() => change(chosen.filter((_, j) => j !== i))}>
              Take away
            </button>
          )}
        </div>
      ))}
      {free !== undefined && (
        <button type="button" class="quiet" onClick={() => change([...chosen, free])}>
          Add another {facts.name}
        </button>
      )}
    </div>
  );
}

/** Words or numbers with commas between them. */
function List({ facts, value, errors, read, set }: { facts: FieldFacts; value: unknown; errors: string[]; read: (written: string) => unknown; set: (value: unknown) => void }) {
  const [text, write] = useWritten(value, read, (x) => (Array.isArray(x) ? x.join(", ") : ""));
  return (
    <Text
      label={facts.name}
      value={text}
      errors={errors}
      hint={facts.says}
      wide
      set={(written) => {
        write(written);
        set(read(written));
      }}
    />
  );
}

function wordsOf(written: string): string[] | undefined {
  const words = written.split(",").map((w) => w.trim()).filter(Boolean);
  return words.length ? words : undefined;
}

function numbersOf(written: string): unknown[] | undefined {
  return wordsOf(written)?.map(numberOf);
}
