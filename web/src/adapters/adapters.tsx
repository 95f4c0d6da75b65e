// The store: every name with its newest version; of a name all versions, its card, and what differs between two. Reading only; each change
// that could be made stands there as the command that makes it.

import { useEffect, useState } from "preact/hooks";
import { type About, get } from "../api";
import { bytes, number, own, quoted, short, value } from "../format";
import { type Column, Command, Empty, Facts, Failure, Section, Table, useLoaded } from "../parts";
import { link } from "../route";
import { type Meaning, scoreTitle, scoreValue } from "../runs/types";
import { Aliases, CardDiff, Export, Publish, Push } from "./changes";

export interface Version {
  ref: string;
  name: string;
  version: number;
  aliases: string[];
  digest: string;
  method: string | null;
  base: string | null;
  fingerprint: string | null;
  parameters: number | null;
  bytes: number;
  created: string | null;
}

interface Listed {
  adapters: Version[];
  more: boolean;
  after: string;
}

export interface Details extends Version {
  files: Record<string, { digest: string; bytes: number }>;
  note: Record<string, unknown> | null;
  /** What the names of its scores mean. */
  scores: Record<string, Meaning>;
}

interface Difference {
  a: string;
  b: string;
  config: { key: string; a: unknown; b: unknown }[];
  shared: string[];
  tensors: Record<string, number | null>;
  reshaped: string[];
  removed: string[];
  added: string[];
}

function when(created: string | null): string {
  return created ? created.slice(0, 16).replace("T", " ") : "–";
}

const COLUMNS: Column<Version>[] = [
  { key: "aliases", title: "aliases", cell: (v) => v.aliases.join(", ") || "–" },
  { key: "method", title: "method", cell: (v) => v.method ?? "–" },
  { key: "parameters", title: "parameters", number: true, cell: (v) => short(v.parameters) },
  { key: "bytes", title: "size", number: true, cell: (v) => bytes(v.bytes) },
  { key: "created", title: "created", number: true, cell: (v) => when(v.created) },
];

export function AdapterList({ about }: { about: About }) {
  const [listed, setListed] = useState<Listed | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [wanted, setWanted] = useState("");
  const load = async (before: Version[], after: string) => {
    try {
      const part = await get<Listed>("studio/adapters", { after });
      setListed({ ...part, adapters: [...before, ...part.adapters] });
      setError(null);
    } catch (failed) {
      setError(failed);
    }
  };
  useEffect(() => void load([], ""), []);
  if (!listed) return error ? <Failure error={error} again={() => void load([], "")} /> : <p class="note">Reading the store…</p>;
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = listed.adapters.filter((v) => words.every((w) => `${v.name} ${v.method} ${v.base} ${v.aliases.join(" ")}`.toLowerCase().includes(w)));
  return (
    <>
      <h1>Adapters</h1>
      {error ? <Failure error={error} /> : null}
      {listed.adapters.length === 0 ? (
        <Empty>
          <p>There is no adapter in the store that you may see. {about.changes ? "Publish one of a run below." : "Publish one from a run folder."}</p>
          <Command text="trimtab adapters publish RUN/adapters/VARIANT acme/support --alias prod" />
        </Empty>
      ) : (
        <section class="card" aria-label="Adapters of the store">
          <div class="toolbar">
            <label class="grow">
              <span class="hidden">Find adapters</span>
              <input type="search" placeholder="Find by name, alias, method or base" value={wanted} onInput={(e) => setWanted(e.currentTarget.value)} />
            </label>
          </div>
          <Table
            label="Newest versions"
            rows={shown}
            rowKey={(v) => v.name}
            columns={[
              { key: "ref", title: "adapter", cell: (v) => <a href={link("adapters", v.name)}>{v.ref}</a> },
              ...COLUMNS,
              { key: "base", title: "base", cell: (v) => v.base ?? "–" },
            ]}
          />
          {shown.length === 0 && <p class="note">No adapter matches.</p>}
          {listed.more && (
            <button type="button" onClick={() => void load(listed.adapters, listed.after)}>
              More
            </button>
          )}
          <Command text="trimtab adapters list" says="In a terminal" />
        </section>
      )}
      {about.changes && <Publish onDone={() => void load([], "")} />}
    </>
  );
}

export function AdapterPage({ name, about }: { name: string; about: About }) {
  const { found, error, reload } = useLoaded((signal) => get<{ versions: Version[] }>("studio/adapter", { name }, signal), [name]);
  const [number, setNumber] = useState<number | null>(null);
  if (error) return <Failure error={error} again={reload} />;
  if (!found) return <p class="note">Reading…</p>;
  const versions = [...found.versions].reverse();
  const chosen = versions.find((v) => v.version === number) ?? versions[0]!;
  return (
    <>
      <nav class="crumbs" aria-label="Way back">
        <a href={link("adapters")}>Adapters</a> <span aria-hidden="true">/</span>
      </nav>
      <h1>{name}</h1>
      <Section title="Versions" id="versions">
        <Table
          label={`Versions of ${name}`}
          rows={versions}
          rowKey={(v) => v.ref}
          columns={[
            {
              key: "version",
              title: "version",
              cell: (v) => (
                <button type="button" class="quiet" aria-pressed={v === chosen} onClick={() => setNumber(v.version)}>
                  @{v.version}
                </button>
              ),
            },
            ...COLUMNS,
          ]}
        />
      </Section>
      {versions.length > 1 && <Diff key={name} versions={versions} />}
      <Card key={chosen.ref} refOf={chosen.ref} changes={about.changes || about.serves} />
      {(about.changes || about.serves) && <Aliases key={`aliases ${chosen.ref}`} version={chosen} onDone={reload} />}
      {about.changes && <Export key={`export ${chosen.ref}`} version={chosen} />}
      {about.changes && <Push key={`push ${chosen.ref}`} version={chosen} />}
    </>
  );
}

function Diff({ versions }: { versions: Version[] }) {
  const [a, setA] = useState(versions[1]!.ref);
  const [b, setB] = useState(versions[0]!.ref);
  const { found, error } = useLoaded((signal) => get<Difference>("studio/diff", { a, b }, signal), [a, b]);
  const pick = (label: string, ref: string, set: (ref: string) => void) => (
    <label class="pick">
      <span>{label}</span>
      <select aria-label={`Compare ${label}`} value={ref} onChange={(e) => set(e.currentTarget.value)}>
        {versions.map((v) => (
          <option key={v.ref} value={v.ref}>
            @{v.version}
          </option>
        ))}
      </select>
    </label>
  );
  return (
    <Section
      title="What differs"
      id="diff"
      aside={
        <div class="controls">
          {pick("from", a, setA)}
          {pick("to", b, setB)}
        </div>
      }
    >
      <CardDiff a={a} b={b} />
      {error ? <Failure error={error} /> : null}
      {found && found.a === a && found.b === b ? <Found found={found} /> : !error && <p class="note">Comparing…</p>}
      <Command text={`trimtab adapters diff ${quoted(a)} ${quoted(b)}`} says="In a terminal" />
    </Section>
  );
}

function Found({ found }: { found: Difference }) {
  const tensors = Object.entries(found.tensors);
  const apart = tensors.filter(([, d]) => d !== 0).sort((x, y) => (y[1] ?? Infinity) - (x[1] ?? Infinity));
  const others: [string, string[]][] = [
    ["of another shape", found.reshaped],
    ["only in the first", found.removed],
    ["only in the second", found.added],
  ];
  return (
    <>
      {found.config.length ? (
        <Table
          label="Settings that differ"
          rows={found.config}
          rowKey={(c) => c.key}
          columns={[
            { key: "key", title: "setting", cell: (c) => c.key },
            { key: "a", title: found.a, cell: (c) => value(c.a) },
            { key: "b", title: found.b, cell: (c) => value(c.b) },
          ]}
        />
      ) : (
        <p class="note">adapter_config.json says the same.</p>
      )}
      <p class="note">
        {tensors.length || others.some(([, names]) => names.length)
          ? `${tensors.length - apart.length} tensors are equal, ${apart.length} changed${others.map(([what, names]) => (names.length ? `, ${names.length} ${what}` : "")).join("")}.`
          : found.shared.length
            ? `Files that are equal: ${found.shared.join(", ")}.`
            : "No file is equal."}
      </p>
      {apart.length > 0 && (
        <Table
          narrow
          label="Tensors that changed most"
          rows={apart.slice(0, 12)}
          rowKey={([name]) => name}
          columns={[
            { key: "name", title: "changed most", cell: ([name]) => <code>{name}</code> },
            { key: "by", title: "by, relative", number: true, cell: ([, d]) => (d === null ? "∞" : number(d, 3)) },
          ]}
        />
      )}
    </>
  );
}

function Card({ refOf, changes }: { refOf: string; changes: boolean }) {
  const { found, error } = useLoaded((signal) => get<Details>("studio/version", { ref: refOf }, signal), [refOf]);
  if (error) return <Failure error={error} />;
  if (!found) return <p class="note">Reading {refOf}…</p>;
  const run = object(found.note?.["run"]);
  const facts: [string, string][] = [
    ["base", found.base ?? "not named"],
    ["base's fingerprint", found.fingerprint ?? "none: it is unverified"],
    ["method", found.method ?? "–"],
    ["parameters", number(found.parameters)],
    ["size", bytes(found.bytes)],
    ["created", when(found.created)],
    ["training rows", run["data_digest"] ? String(run["data_digest"]) : "–"],
    ["digest", found.digest],
  ];
  const [scores, base] = [numbers(run["metrics"]), numbers(run["base_metrics"])];
  const settings = Object.entries({ ...object(found.note?.["fields"]), ...object(run["options"]) }).filter(([, x]) => x !== null && x !== "" && JSON.stringify(x) !== "{}");
  const q = quoted(found.ref);
  return (
    <Section title={found.ref} id="card">
      <Facts look="pairs" facts={facts} />
      {scores.length > 0 && (
        <>
          <h3>Scores on held-out rows</h3>
          <Table
            narrow
            label="Scores of this version"
            rows={scores}
            rowKey={([name]) => name}
            columns={[
              { key: "name", title: "score", cell: ([name]) => scoreTitle(name, own(found.scores, name)) },
              { key: "base", title: "base", number: true, cell: ([name]) => scoreValue(base.find(([n]) => n === name)?.[1], own(found.scores, name)) },
              { key: "own", title: "with this adapter", number: true, cell: ([name, x]) => scoreValue(x, own(found.scores, name)) },
            ]}
          />
        </>
      )}
      {settings.length > 0 && (
        <>
          <h3>Settings</h3>
          <ul class="chips">
            {settings.map(([name, x]) => (
              <li key={name}>
                {name} <strong>{value(x)}</strong>
              </li>
            ))}
          </ul>
        </>
      )}
      <h3>Files</h3>
      <Table
        narrow
        label="Files of this version"
        rows={Object.entries(found.files)}
        rowKey={([name]) => name}
        columns={[
          { key: "name", title: "file", cell: ([name]) => name },
          { key: "bytes", title: "size", number: true, cell: ([, f]) => bytes(f.bytes) },
          { key: "digest", title: "digest", cell: ([, f]) => <code>{f.digest}</code> },
        ]}
      />
      <h3>What can be done with it</h3>
      <div class="commands">
        <Command says="Ask it" text={`trimtab generate --adapter ${q} "How do I cancel?"`} />
        {!changes && <Command says="Move an alias here" text={`trimtab adapters alias ${q} prod`} />}
        <Command says="Write it as peft has it" text={`trimtab export ${q} FOLDER`} />
        <Command says="Copy it elsewhere" text={`trimtab adapters push ${q} TARGET`} />
        <Command says="Take it out of the store" text={`trimtab adapters remove ${q}`} />
      </div>
    </Section>
  );
}

export function object(x: unknown): Record<string, unknown> {
  return typeof x === "object" && x !== null && !Array.isArray(x) ? (x as Record<string, unknown>) : {};
}

export function numbers(x: unknown): [string, number][] {
  return Object.entries(object(x)).flatMap(([name, v]) => (typeof v === "number" && name !== "rows" ? [[name, v] as [string, number]] : []));
}
