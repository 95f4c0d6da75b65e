// Beginning a run from a run file, as a process that goes on without this page.

import { useState } from "preact/hooks";
import { get, post } from "../api";
import { quoted } from "../format";
import { Command, Failure, Options, Section, useLoaded } from "../parts";
import { link } from "../route";
import { Log } from "./control";

interface Begun {
  out: string;
  command: string;
  log: string;
  from: number;
}

export function Begin() {
  const { found, error: unread, reload } = useLoaded((signal) => get<{ files: string[] }>("studio/run-files", {}, signal), []);
  const [file, setFile] = useState("");
  const [resume, setResume] = useState(false);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>(null);
  const [begun, setBegun] = useState<Begun[]>([]);
  const files = found?.files ?? [];
  const chosen = files.includes(file) ? file : (files[0] ?? "");
  if (unread) return <Failure error={unread} again={reload} />;
  if (!found) return null;
  const submit = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      const made = await post<Begun>("studio/begin", { file: chosen, resume });
      setBegun([made, ...begun.filter((b) => b.out !== made.out)]);
    } catch (failed) {
      setError(failed);
    }
    setBusy(false);
    reload();
  };
  return (
    <Section title="Begin a run" id="begin">
      {files.length === 0 ? (
        <>
          <p class="note">
            There is no run file below this folder. <a href={link("new")}>New run</a> makes one from rows, and so does a command:
          </p>
          <Command text="trimtab init ROWS.jsonl" />
        </>
      ) : (
        <form onSubmit={submit}>
          <div class="row">
            <label class="pick">
              <span>Run file</span>
              <select value={chosen} onChange={(e) => setFile(e.currentTarget.value)}>
                <Options words={files} />
              </select>
            </label>
            <label class="check">
              <input type="checkbox" checked={resume} onChange={(e) => setResume(e.currentTarget.checked)} /> go on with what it has trained
            </label>
            <button type="submit" class="main" disabled={busy}>
              Begin
            </button>
          </div>
          {error ? <Failure error={error} /> : null}
          <Command text={`trimtab train ${quoted(chosen)}${resume ? " --resume" : ""}`} says="In a terminal" />
        </form>
      )}
      {begun.map((b) => (
        <div key={b.out}>
          <p class="note" role="status">
            Begun: {b.out}. It goes on if this page or its server ends, and is in the list once it trains.
          </p>
          <Log ask={{ out: b.out, start: b.from }} name={b.out} />
        </div>
      ))}
    </Section>
  );
}
