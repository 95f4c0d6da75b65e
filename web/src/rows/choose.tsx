// Which rows to look at: those of a run, or a file in the folders that the studio shows.

import { useState } from "preact/hooks";
import { get } from "../api";
import { ago, bytes } from "../format";
import { Command, Empty, Failure, Path, Section, Table, useLoaded } from "../parts";
import { link } from "../route";
import type { RunLine } from "../runs/types";

export interface FileLine {
  path: string;
  bytes: number;
  changed: number;
}

export interface Files {
  folders: string[];
  files: FileLine[];
  cut: boolean;
  base: string;
}

const SHOWN = 100;

export function ChooseRows() {
  const files = useLoaded((signal) => get<Files>("studio/files", {}, signal), []);
  const runs = useLoaded((signal) => get<{ runs: RunLine[] }>("studio/runs", {}, signal), []);
  const readable = runs.found?.runs.filter((r) => r.error === null);
  return (
    <>
      <div class="page-head">
        <h1>Data</h1>
        <p class="note">Rows as training gets them: what is learnt, what is dropped and why, how long they are.</p>
      </div>
      {files.error ? <Failure error={files.error} /> : null}
      {runs.error ? <Failure error={runs.error} /> : null}
      <div class="halves">
        <Section title="Of a run" id="of-run">
          {readable && readable.length > 0 ? (
            <Table
              label="Runs whose rows can be shown"
              rows={readable.slice(0, SHOWN)}
              rowKey={(r) => r.id}
              columns={[
                { key: "name", title: "run", cell: (r) => <a href={link("data", "run", r.id)}>{r.name}</a> },
                { key: "base", title: "base", cell: (r) => r.base ?? "–" },
                { key: "changed", title: "changed", number: true, cell: (r) => ago(r.changed) },
              ]}
            />
          ) : (
            <p class="note">{readable ? "There is no run here yet." : "Looking for runs…"}</p>
          )}
        </Section>
        <Section title="Of a file" id="of-file">
          {files.found ? <FileChoice files={files.found} go={(path) => (location.hash = link("data", "file", path))} /> : <p class="note">Looking for files…</p>}
        </Section>
      </div>
      {files.found && files.found.files.length === 0 && (
        <Empty>
          <p>There is no file of rows in the folders that this page may show. Start it with the folder that holds them.</p>
          <Command text="trimtab studio RUNS --data FOLDER" />
        </Empty>
      )}
    </>
  );
}

/** A list of files to press, and a field for a path that is not listed, such as a folder of texts. */
export function FileChoice({ files, chosen, go }: { files: Files; chosen?: string; go: (path: string) => void }) {
  const [wanted, setWanted] = useState("");
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = files.files.filter((f) => words.every((w) => f.path.toLowerCase().includes(w)));
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        if (wanted.trim()) go(shown.length === 1 ? shown[0]!.path : wanted.trim());
      }}
    >
      <div class="row">
        <label class="grow">
          <span>Find a file, or write a path (a folder of texts, hf:org/name)</span>
          <input type="text" value={wanted} spellcheck={false} autoComplete="off" onInput={(e) => setWanted(e.currentTarget.value)} />
        </label>
        <button type="submit" disabled={!wanted.trim()}>
          Open
        </button>
      </div>
      <ul class="files" aria-label="Files of rows">
        {shown.slice(0, SHOWN).map((f) => (
          <li key={f.path}>
            <button type="button" class="file" aria-pressed={f.path === chosen} onClick={() => go(f.path)}>
              <Path text={f.path} />
              <span class="note">
                {bytes(f.bytes)}, {ago(f.changed)}
              </span>
            </button>
          </li>
        ))}
      </ul>
      {shown.length === 0 && <p class="note">No file matches; “Open” tries it as a path.</p>}
      {shown.length > SHOWN && <p class="note">{shown.length - SHOWN} more: write a part of the name.</p>}
      {files.cut && <p class="note">There are more files than are looked at: write the path.</p>}
    </form>
  );
}
