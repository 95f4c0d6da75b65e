// What can be done with a run that trains: stop, pause, resume and clone its variants. Each button shows the command that it equals.

import { useEffect, useRef, useState } from "preact/hooks";
import { get, post } from "../api";
import { own, quoted, value } from "../format";
import { Command, Failure, Section, Table, type Column, usePoll } from "../parts";
import type { RunFacts, State, VariantFacts } from "./types";

type Do = "stop" | "pause" | "resume" | "end";
/** What is asked about before it is done, or filled in: of a variant, or ("") of the run. */
type Open = { what: "stop" | "clone"; name: string } | null;

export function Control({ run, state }: { run: RunFacts; state: State }) {
  const [open, setOpen] = useState<Open>(null);
  const [error, setError] = useState<unknown>(null);
  const [said, setSaid] = useState("");
  const [command, setCommand] = useState("");
  const last = useRef<HTMLElement | null>(null); // where the keyboard goes back to
  const { control } = run;
  if (!control.takes || state === "finished") return null;
  const folder = quoted(run.path);
  const close = () => {
    setOpen(null);
    last.current?.focus();
  };
  const ask = (next: Open, from: HTMLElement) => {
    last.current = from;
    setError(null);
    setOpen(next);
  };
  const give = async (act: Do, names: string[]) => {
    const line = `trimtab runs ${act === "end" ? "stop" : act} ${[folder, ...names.map(quoted)].join(" ")}`;
    setCommand(line);
    setError(null);
    try {
      const { runs } = await post<{ runs: boolean }>("studio/order", { id: run.id, do: act, variants: names });
      setSaid(runs ? `Asked: ${told(act, names)}. The run does it after the step that runs.` : `Asked: ${told(act, names)}. It holds once the run is resumed.`);
    } catch (failed) {
      setError(failed);
    }
  };
  const stop = (name: string) => {
    void give(name ? "stop" : "end", name ? [name] : []);
    close();
  };
  const columns: Column<VariantFacts>[] = [
    { key: "name", title: "variant", cell: (v) => v.name },
    { key: "state", title: "state", cell: (v) => <StandsAt run={run} variant={v} state={state} /> },
    {
      key: "do",
      title: "control",
      cell: (v) => {
        const over = own(control.ended, v.name) !== undefined || Boolean(v.stopped);
        const paused = control.paused.includes(v.name) || own(control.asked, v.name) === "pause";
        return (
          <span class="acts" role="group" aria-label={v.name}>
            <button type="button" disabled={over} aria-label={`${paused ? "Resume" : "Pause"} ${v.name}`} onClick={() => give(paused ? "resume" : "pause", [v.name])}>
              {paused ? "Resume" : "Pause"}
            </button>
            <button type="button" disabled={over} aria-label={`Stop ${v.name}`} onClick={(e) => ask({ what: "stop", name: v.name }, e.currentTarget)}>
              Stop…
            </button>
            <button type="button" aria-label={`Clone ${v.name}`} onClick={(e) => ask({ what: "clone", name: v.name }, e.currentTarget)}>
              Clone…
            </button>
          </span>
        );
      },
    },
  ];
  const of = run.variants.find((v) => v.name === open?.name);
  return (
    <Section
      title="Control"
      id={`control-${run.id}`}
      aside={
        state === "running" ? (
          <button type="button" onClick={(e) => ask({ what: "stop", name: "" }, e.currentTarget)}>
            Stop the run…
          </button>
        ) : undefined
      }
    >
      <Table label="Variants to control" columns={columns} rows={run.variants} rowKey={(v) => v.name} narrow />
      {open?.what === "stop" && <Confirm name={open.name} folder={folder} onYes={() => stop(open.name)} onNo={close} />}
      {open?.what === "clone" && of && (
        <CloneForm
          key={of.name}
          run={run}
          of={of}
          onAsked={(line, text) => {
            setCommand(line);
            setSaid(text);
            close();
          }}
          onClosed={close}
        />
      )}
      {Object.entries(control.refused).map(([name, why]) => (
        <p key={name} class="failure" role="note">
          The clone {name} does not join: {why}
        </p>
      ))}
      {error ? <Failure error={error} /> : null}
      <p class="note" role="status">
        {said}
      </p>
      {command && <Command text={command} says="In a terminal" />}
    </Section>
  );
}

function told(act: Do, names: string[]): string {
  return act === "end" ? "stop the run" : `${act} ${names.join(", ")}`;
}

function StandsAt({ run, variant, state }: { run: RunFacts; variant: VariantFacts; state: State }) {
  const { control } = run;
  const ended = own(control.ended, variant.name);
  if (variant.stopped) return <span class="state stopped">diverged</span>;
  if (ended) return <span class="state stopped">{ended}</span>;
  const paused = control.paused.includes(variant.name);
  const asked = own(control.asked, variant.name);
  if (asked === "stop") return <span class="state">stopping</span>;
  if (asked === "pause" && !paused) return <span class="state">pausing</span>;
  if (paused) return <span class="state paused">{asked === "pause" ? "paused" : "resuming"}</span>;
  return <span class={`state ${state}`}>{state === "running" ? "training" : "not training"}</span>;
}

function Confirm({ name, folder, onYes, onNo }: { name: string; folder: string; onYes: () => void; onNo: () => void }) {
  const no = useRef<HTMLButtonElement>(null);
  useEffect(() => no.current?.focus(), [name]);
  return (
    <div class="order" role="alertdialog" aria-labelledby="stop-title" aria-describedby="stop-says" onKeyDown={(e) => e.key === "Escape" && onNo()}>
      <h3 id="stop-title">{name ? `Stop ${name} for good?` : "Stop the whole run?"}</h3>
      <p id="stop-says" class="note">
        {name
          ? "Its best validated step is kept, or its last one, and scored when the run ends. The others go on. It cannot be resumed, only cloned."
          : "It writes a checkpoint after the step that runs, and ends. “trimtab train RUN.yaml --resume” goes on with it."}
      </p>
      <div class="row">
        <button type="button" class="main" onClick={onYes}>
          {name ? `Stop ${name}` : "Stop the run"}
        </button>
        <button type="button" ref={no} onClick={onNo}>
          Let it train
        </button>
      </div>
      <Command text={`trimtab runs stop ${folder}${name ? ` ${quoted(name)}` : ""}`} says="In a terminal" />
    </div>
  );
}

interface Change {
  key: string;
  text: string;
}

function CloneForm({ run, of, onAsked, onClosed }: { run: RunFacts; of: VariantFacts; onAsked: (command: string, said: string) => void; onClosed: () => void }) {
  const free = (n: number): string => (run.variants.some((v) => v.name === `${of.name}-${n}`) ? free(n + 1) : `${of.name}-${n}`);
  const [name, setName] = useState(() => free(2));
  const [changes, setChanges] = useState<Change[]>([{ key: "lr", text: "" }]);
  const [error, setError] = useState<unknown>(null);
  const [busy, setBusy] = useState(false);
  const first = useRef<HTMLInputElement>(null);
  useEffect(() => first.current?.select(), []);
  const known = Object.keys(of.settings);
  const given = changes.filter((c) => c.key && c.text.trim()).map((c) => `${c.key}=${c.text.trim()}`);
  const command = ["trimtab runs clone", quoted(run.path), quoted(of.name), "--name", quoted(name), ...given.map((c) => `--set ${quoted(c)}`)].join(" ");
  const put = (i: number, change: Partial<Change>) => setChanges(changes.map((c, n) => (n === i ? { ...c, ...change } : c)));
  const submit = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    try {
      await post("studio/clone", { id: run.id, of: of.name, name, changes: given });
      onAsked(command, `Asked: ${name}. It joins after the step that runs, if the run can take it.`);
    } catch (failed) {
      setError(failed);
      setBusy(false);
    }
  };
  return (
    <form class="order" aria-labelledby="clone-title" onSubmit={submit} onKeyDown={(e) => e.key === "Escape" && onClosed()}>
      <h3 id="clone-title">Clone {of.name}</h3>
      <p class="note">The clone has the same settings but for these. It trains from its first step on, beside the others.</p>
      <div class="row">
        <label>
          <span>Name of the clone</span>
          <input ref={first} type="text" value={name} maxLength={63} required onInput={(e) => setName(e.currentTarget.value)} />
        </label>
      </div>
      {changes.map((c, i) => (
        <div class="row" key={i}>
          <label>
            <span>Setting</span>
            <input type="text" list="settings-known" value={c.key} onInput={(e) => put(i, { key: e.currentTarget.value.trim() })} />
          </label>
          <label>
            <span>Value</span>
            <input type="text" value={c.text} placeholder={value(of.settings[c.key])} onInput={(e) => put(i, { text: e.currentTarget.value })} />
          </label>
          {changes.length > 1 && (
            <button type="button" class="quiet" aria-label={`Leave ${c.key || "this setting"} as it is`} onClick={() => setChanges(changes.filter((_, n) => n !== i))}>
              Remove
            </button>
          )}
        </div>
      ))}
      <datalist id="settings-known">
        {known.map((k) => (
          <option key={k} value={k} />
        ))}
      </datalist>
      <div class="row">
        <button type="button" class="quiet" onClick={() => setChanges([...changes, { key: "", text: "" }])}>
          Another setting
        </button>
      </div>
      {error ? <Failure error={error} /> : null}
      <div class="row">
        <button type="submit" class="main" disabled={busy || !name.trim()}>
          Clone it
        </button>
        <button type="button" onClick={onClosed}>
          Cancel
        </button>
      </div>
      <Command text={command} says="In a terminal" />
    </form>
  );
}

/** What a run has printed that was begun here. */
export function Log({ ask, name }: { ask: Record<string, string | number>; name: string }) {
  const [text, setText] = useState<string | null>(null);
  const [open, setOpen] = useState("out" in ask);
  usePoll(
    async () => {
      if (open) setText((await get<{ text: string }>("studio/log", ask)).text);
    },
    open ? 1500 : null,
    [open, name],
  );
  return (
    <details class="log" open={open} onToggle={(e) => setOpen(e.currentTarget.open)}>
      <summary>What {name} prints</summary>
      <pre role="region" tabIndex={0} aria-label={`What ${name} prints`}>
        {text === null ? "Nothing yet." : text || "Nothing yet."}
      </pre>
    </details>
  );
}
