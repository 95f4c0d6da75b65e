// What can be done with the store: publish, aliases, export, push; and how the cards of two versions differ. Each shows its command.

import { useEffect, useState } from "preact/hooks";
import { ApiError, get, post, request } from "../api";
import { bytes, duration, number, own, quoted, value } from "../format";
import { Command, Failure, Options, Section, Table, useLoaded } from "../parts";
import { type RunLine, scoreTitle, scoreValue } from "../runs/types";
import { type Details, numbers, object, type Version } from "./adapters";

interface Job {
  key: string;
  command: string;
  state: "running" | "done" | "failed";
  result: unknown;
  said: string;
  seconds: number;
}

const POLL_MS = 500;

/** A command that the server runs: begun by `begin`, followed to its end. */
function useJob(onDone: (result: unknown) => void) {
  const [job, setJob] = useState<Job | null>(null);
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    if (job?.state !== "running") return undefined;
    const timer = setTimeout(async () => {
      try {
        const told = { key: job.key, ...(await get<Omit<Job, "key">>("studio/command", { key: job.key })) };
        setJob(told);
        if (told.state === "done") onDone(told.result);
        setError(null);
      } catch (failed) {
        setError(failed); // the command goes on, whether it is heard of or not
        setJob(failed instanceof ApiError && failed.status === 0 ? { ...job } : null);
      }
    }, POLL_MS);
    return () => clearTimeout(timer);
  }, [job]);
  const begin = async (path: string, body: object) => {
    setError(null);
    setJob(null);
    try {
      setJob(await post<Job>(path, body));
    } catch (failed) {
      setError(failed);
    }
  };
  return { job, error, begin, busy: job?.state === "running" };
}

function Progress({ job, error, done }: { job: Job | null; error: unknown; done: (result: Record<string, unknown>) => string }) {
  if (error) return <Failure error={error} />;
  if (!job) return null;
  if (job.state === "failed") return <Failure error={job.said} />;
  return (
    <p class="note" role="status">
      {job.state === "running" ? (
        <>
          <span class="spinner" aria-hidden="true" /> running {job.seconds > 2 ? duration(Math.round(job.seconds)) : ""}
        </>
      ) : (
        done(object(job.result))
      )}
    </p>
  );
}

export function Publish({ onDone }: { onDone: () => void }) {
  const runs = useLoaded((signal) => get<{ runs: RunLine[] }>("studio/runs", {}, signal), []);
  const [chosen, setChosen] = useState("");
  const [variant, setVariant] = useState("");
  const [name, setName] = useState("");
  const [alias, setAlias] = useState("");
  const readable = runs.found?.runs.filter((r) => r.error === null) ?? [];
  const run = readable.find((r) => r.id === chosen) ?? readable[0];
  const there = useLoaded((signal) => (run ? get<{ adapters: string[] }>("studio/run-adapters", { id: run.id }, signal) : Promise.resolve({ adapters: [] })), [run?.id]);
  const names = there.found?.adapters ?? [];
  const which = names.includes(variant) ? variant : (names[0] ?? "");
  const { job, error, begin, busy } = useJob(onDone);
  if (!run) return null;
  const command = `trimtab adapters publish ${quoted(`${run.path}/adapters/${which || "VARIANT"}`)} ${quoted(name || "NAMESPACE/NAME")}${alias ? ` --alias ${quoted(alias)}` : ""}`;
  return (
    <Section title="Publish a run's adapter" id="publish">
      <form
        onSubmit={(event) => {
          event.preventDefault();
          void begin("studio/publish", { run: run.id, variant: which, name, aliases: alias ? [alias] : [] });
        }}
      >
        <div class="fields">
          <label class="field">
            <span>Run</span>
            <select value={run.id} onChange={(e) => setChosen(e.currentTarget.value)}>
              {readable.map((r) => (
                <option key={r.id} value={r.id}>
                  {r.name}
                </option>
              ))}
            </select>
          </label>
          <label class="field">
            <span>Variant</span>
            <select value={which} onChange={(e) => setVariant(e.currentTarget.value)} disabled={!names.length}>
              <Options words={names} />
            </select>
          </label>
          <label class="field">
            <span>Name in the store</span>
            <input type="text" value={name} placeholder="acme/support" spellcheck={false} autoComplete="off" onInput={(e) => setName(e.currentTarget.value.trim())} />
          </label>
          <label class="field">
            <span>Alias, if any</span>
            <input type="text" value={alias} placeholder="prod" spellcheck={false} autoComplete="off" onInput={(e) => setAlias(e.currentTarget.value.trim())} />
          </label>
        </div>
        {there.found && !names.length && <p class="note">This run has no adapter yet: they are written when it ends.</p>}
        {there.error ? <Failure error={there.error} /> : null}
        <div class="row acts-row">
          <button type="submit" class="main" disabled={busy || !which || !name}>
            Publish
          </button>
        </div>
      </form>
      <Progress job={job} error={error} done={(r) => `Published as ${value(r["ref"])}.`} />
      <Command says="In a terminal" text={command} />
    </Section>
  );
}

export function Aliases({ version, onDone }: { version: Version; onDone: () => void }) {
  const [alias, setAlias] = useState("");
  const [error, setError] = useState<unknown>(null);
  const [said, setSaid] = useState("");
  const move = async (take: boolean, word: string) => {
    setError(null);
    setSaid("");
    try {
      await post("studio/alias", { ref: version.ref, alias: word, take });
      setSaid(take ? `${version.name}@${word} is no more.` : `${version.name}@${word} is ${version.ref}.`);
      setAlias("");
      onDone();
    } catch (failed) {
      setError(failed);
    }
  };
  const own = version.aliases.filter((a) => a !== "latest");
  return (
    <Section title="Aliases" id="aliases">
      <p class="note">An alias such as prod stands for one version. Who asks for {version.name}@prod gets the one that it stands for now.</p>
      <form
        class="row"
        onSubmit={(event) => {
          event.preventDefault();
          void move(false, alias);
        }}
      >
        <label class="grow">
          <span>Alias for {version.ref}</span>
          <input type="text" value={alias} placeholder="prod" spellcheck={false} autoComplete="off" onInput={(e) => setAlias(e.currentTarget.value.trim())} />
        </label>
        <button type="submit" class="main" disabled={!alias}>
          Move it here
        </button>
        {own.map((a) => (
          <button key={a} type="button" onClick={() => void move(true, a)}>
            Take {a} away
          </button>
        ))}
      </form>
      {error ? <Failure error={error} /> : null}
      {said && (
        <p class="note" role="status">
          {said}
        </p>
      )}
      <Command says="In a terminal" text={`trimtab adapters alias ${quoted(version.ref)} ${quoted(alias || "prod")}`} />
    </Section>
  );
}

const FORMATS: [string, string][] = [
  ["merged", "base and adapter as one ordinary model folder"],
  ["peft", "the folder that peft loads"],
  ["vllm", "for vLLM: LoRA with one rank and one scaling"],
  ["gguf", "for llama.cpp: LoRA on a Llama model"],
];

export function Export({ version }: { version: Version }) {
  const [format, setFormat] = useState("merged");
  const [given, setGiven] = useState("");
  const [base, setBase] = useState(version.base ?? "");
  const [error, setError] = useState<unknown>(null);
  const { job, error: failed, begin, busy } = useJob(() => undefined);
  const folder = given || `${version.name.replaceAll("/", "-")}-${version.version}-${format}`;
  const take = async () => {
    setError(null);
    try {
      const body = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ ref: version.ref }) };
      const found = await (await request("studio/adapter.zip", body)).blob();
      const address = URL.createObjectURL(found);
      const a = document.createElement("a");
      a.href = address;
      a.download = `${version.name.replaceAll("/", "-")}-${version.version}.zip`;
      a.click();
      setTimeout(() => URL.revokeObjectURL(address), 10_000);
    } catch (problem) {
      setError(problem);
    }
  };
  return (
    <Section
      title="Export"
      id="export"
      aside={
        <button type="button" onClick={() => void take()}>
          Download as it is ({bytes(version.bytes)})
        </button>
      }
    >
      <p class="note">Written beside the runs, read back, and compared. What a format cannot hold is refused. The download is the folder as the store has it.</p>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          void begin("studio/export", { ref: version.ref, format, folder, base });
        }}
      >
        <div class="fields">
          <label class="field">
            <span>Format</span>
            <select value={format} onChange={(e) => setFormat(e.currentTarget.value)}>
              {FORMATS.map(([f]) => (
                <option key={f} value={f}>
                  {f}
                </option>
              ))}
            </select>
            <span class="field-hint">{FORMATS.find(([f]) => f === format)?.[1]}</span>
          </label>
          <label class="field">
            <span>Base</span>
            <input type="text" value={base} spellcheck={false} autoComplete="off" onInput={(e) => setBase(e.currentTarget.value.trim())} />
          </label>
          <label class="field">
            <span>Folder</span>
            <input type="text" value={given} placeholder={folder} spellcheck={false} autoComplete="off" onInput={(e) => setGiven(e.currentTarget.value.trim())} />
          </label>
        </div>
        <div class="row acts-row">
          <button type="submit" class="main" disabled={busy}>
            Export
          </button>
        </div>
      </form>
      {error ? <Failure error={error} /> : null}
      <Progress job={job} error={failed} done={(r) => `Written: ${value(r["folder"])}.`} />
      <Command says="In a terminal" text={job?.command ?? `trimtab export ${quoted(version.ref)} ${quoted(folder)} --format ${format}${base ? ` --base ${quoted(base)}` : ""}`} />
    </Section>
  );
}

export function Push({ version }: { version: Version }) {
  const [url, setUrl] = useState("");
  const { job, error, begin, busy } = useJob(() => undefined);
  return (
    <Section title="Push" id="push">
      <form
        class="row"
        onSubmit={(event) => {
          event.preventDefault();
          void begin("studio/push", { ref: version.ref, url });
        }}
      >
        <label class="grow">
          <span>Address (oci://, s3://, hf://, file:///)</span>
          <input type="text" value={url} placeholder="oci://registry.example.com/acme/support" spellcheck={false} autoComplete="off" onInput={(e) => setUrl(e.currentTarget.value.trim())} />
        </label>
        <button type="submit" class="main" disabled={busy || !url}>
          Push
        </button>
      </form>
      <p class="note">Credentials come from where the other tools keep them, never from the address.</p>
      <Progress job={job} error={error} done={(r) => `${value(r["ref"])} is at ${value(r["url"])}; ${bytes(Number(r["bytes_moved"] ?? 0))} sent.`} />
      <Command says="In a terminal" text={`trimtab adapters push ${quoted(version.ref)} ${quoted(url || "ADDRESS")}`} />
    </Section>
  );
}

/** How the cards of two versions differ: scores, settings of the training, rows, base. */
export function CardDiff({ a, b }: { a: string; b: string }) {
  const first = useLoaded((signal) => get<Details>("studio/version", { ref: a }, signal), [a]);
  const second = useLoaded((signal) => get<Details>("studio/version", { ref: b }, signal), [b]);
  const error = first.error ?? second.error;
  if (error) return <Failure error={error} />;
  if (first.found?.ref !== a || second.found?.ref !== b) return null;
  const [one, two] = [told(first.found), told(second.found)];
  const differ = [...new Set([...Object.keys(one), ...Object.keys(two)])].filter((key) => one[key] !== two[key]);
  if (!differ.length) return <p class="note">The cards say the same.</p>;
  return (
    <Table
      label="Cards that differ"
      rows={differ}
      rowKey={(key) => key}
      columns={[
        { key: "key", title: "card", cell: (key) => key },
        { key: "a", title: a, cell: (key) => one[key] ?? "–" },
        { key: "b", title: b, cell: (key) => two[key] ?? "–" },
      ]}
    />
  );
}

function told(v: Details): Record<string, string> {
  const run = object(v.note?.["run"]);
  const facts: Record<string, string> = { base: v.base ?? "–", "base's fingerprint": v.fingerprint ?? "–", method: v.method ?? "–", parameters: number(v.parameters), size: bytes(v.bytes) };
  if (run["data_digest"]) facts["training rows"] = String(run["data_digest"]);
  for (const [name, x] of Object.entries(object(run["options"]))) facts[name] = value(x);
  for (const [name, x] of numbers(run["metrics"])) {
    const meaning = own(v.scores, name);
    facts[`score: ${scoreTitle(name, meaning)}`] = scoreValue(x, meaning);
  }
  return facts;
}
