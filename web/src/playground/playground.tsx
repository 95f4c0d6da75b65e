// One prompt, answered by the base and any adapters side by side. All are asked at once, so the server runs them in one mixed batch.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type About, get } from "../api";
import { Failure, useLoaded } from "../parts";
import { type Answer, ask, type Call, type Settings, type Turn, UNASKED } from "./ask";
import { AnswerColumn } from "./answer";
import { EXAMPLE_PROMPT, read, ToolsField } from "./tools";

interface Model {
  id: string;
  parent: string | null;
}

const MOST = 6; // a browser opens no more connections to a server at once
const START: Settings = { system: "", prompt: "", temperature: 0, top_p: 1, max_tokens: 128, seed: null, logprobs: true, tools: "", choice: "auto", single: false };

export function Playground({ about }: { about: About }) {
  const { found, error, reload } = useLoaded((signal) => get<{ data: Model[]; has_more: boolean }>("v1/models", {}, signal), []);
  const [settings, setSettings] = useState(START);
  const [chosen, setChosen] = useState<string[] | null>(null);
  const [added, setAdded] = useState<string[]>([]);
  const [wanted, setWanted] = useState("");
  const [asked, setAsked] = useState(START); // what the answers that are shown were asked with
  const [turns, setTurns] = useState<ReadonlyMap<string, Turn[]>>(new Map());
  const [results, setResults] = useState<ReadonlyMap<string, string>>(new Map());
  const control = useRef<AbortController | null>(null);
  const columns = useRef<HTMLDivElement>(null);
  useEffect(() => () => control.current?.abort(), []);

  const names = [...(found?.data.map((m) => m.id) ?? []), ...added];
  const models = chosen ?? names.slice(0, 3);
  const change = (more: Partial<Settings>) => setSettings({ ...settings, ...more });
  const toggle = (name: string, on: boolean) => setChosen(on ? [...models, name].slice(0, MOST) : models.filter((m) => m !== name));

  const { tools, wrong } = useMemo(() => read(settings.tools), [settings.tools]);
  const busy = [...turns.values()].some((all) => last(all)?.answer.running);
  const ready = settings.prompt.trim() !== "" && models.length > 0 && !busy && wrong.length === 0;
  const toolNamed = tools.some((t) => `name:${t.function.name}` === settings.choice);
  const choice = settings.choice.startsWith("name:") && !toolNamed ? "auto" : settings.choice; // its tool has gone
  const sent = { ...settings, choice, tools: tools.length ? settings.tools : "" };

  const take = (model: string, answer: Answer) =>
    setTurns((all) => new Map(all).set(model, [...(all.get(model) ?? []).slice(0, -1), { answer, results: null }]));
  const send = () => {
    if (!ready) return;
    const mine = (control.current = new AbortController());
    setAsked(sent);
    setTurns(new Map(models.map((m) => [m, [{ answer: UNASKED, results: null }]])));
    const shown = columns.current; // below the form on a phone, where nobody would see that answers come
    if (shown && shown.getBoundingClientRect().top > innerHeight * 0.75) shown.scrollIntoView({ block: "start" });
    for (const m of models) void ask(m, sent, [], mine.signal, (answer) => control.current === mine && take(m, answer));
  };
  const typed = (call: Call) => results.get(callKey(call)) ?? "";
  const answerTo = (m: string, before: Turn[]) => {
    const mine = control.current?.signal.aborted === false ? control.current : (control.current = new AbortController());
    setTurns((all) => new Map(all).set(m, [...before, { answer: UNASKED, results: null }]));
    void ask(m, asked, before, mine.signal, (answer) => control.current === mine && take(m, answer));
  };
  const goOn = (wanted: string[]) => {
    for (const m of wanted) answerTo(m, (turns.get(m) ?? []).map((t) => ({ ...t, results: t.results ?? t.answer.calls.map(typed) })));
  };
  const waiting = models.filter((m) => {
    const answer = last(turns.get(m) ?? [])?.answer;
    return answer && answer.calls.length > 0 && !answer.running && !answer.error;
  });
  const answered = waiting.every((m) => last(turns.get(m)!)!.answer.calls.every((call) => typed(call).trim()));
  const stop = () => control.current?.abort();
  const onKey = (event: KeyboardEvent) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    }
  };
  const add = (event: Event) => {
    event.preventDefault();
    const name = wanted.trim();
    if (!name) return;
    if (!names.includes(name)) setAdded([...added, name]);
    if (!models.includes(name)) toggle(name, true);
    setWanted("");
  };
  const listed = names.filter((n) => !wanted || n.toLowerCase().includes(wanted.toLowerCase()) || models.includes(n));

  return (
    <>
      <h1>Playground</h1>
      {error ? <Failure error={error} again={reload} /> : null}
      <div class="playground">
        <form class="card ask" onSubmit={(e) => (e.preventDefault(), send())} onKeyDown={onKey} aria-label="What to ask">
          <label>
            <span>Prompt</span>
            <textarea rows={6} value={settings.prompt} onInput={(e) => change({ prompt: e.currentTarget.value })} />
          </label>
          <label>
            <span>System message, if any</span>
            <textarea rows={2} value={settings.system} onInput={(e) => change({ system: e.currentTarget.value })} />
          </label>
          <div class="numbers">
            <NumberField label="Temperature" value={settings.temperature} min={0} max={2} step={0.1} onValue={(v) => change({ temperature: v ?? 0 })} />
            <NumberField label="top p" value={settings.top_p} min={0.01} max={1} step={0.01} onValue={(v) => change({ top_p: v ?? 1 })} />
            <NumberField label="Tokens at most" value={settings.max_tokens} min={1} max={100000} step={1} onValue={(v) => change({ max_tokens: v ?? 128 })} />
            <NumberField label="Seed" value={settings.seed} min={0} max={2 ** 31} step={1} onValue={(v) => change({ seed: v })} />
          </div>
          <label class="check">
            <input type="checkbox" checked={settings.logprobs} onChange={(e) => change({ logprobs: e.currentTarget.checked })} /> probabilities of tokens
          </label>
          {settings.logprobs && <p class="note">Tinted tokens were less likely. Point at one to see what else might have come.</p>}
          <ToolsField
            text={settings.tools}
            tools={tools}
            wrong={wrong}
            choice={choice}
            single={settings.single}
            onText={(text) => change({ tools: text })}
            onChoice={(to) => change({ choice: to })}
            onSingle={(single) => change({ single })}
            onExample={(text) => change({ tools: text, ...(settings.prompt.trim() ? {} : { prompt: EXAMPLE_PROMPT }) })}
          />
          <div class="row">
            <button type="submit" class="main" disabled={!ready}>
              Ask {models.length === 1 ? models[0] : `${models.length} models`}
            </button>
            <button type="button" disabled={!busy} onClick={stop}>
              Stop
            </button>
            <span class="note">Ctrl Enter</span>
          </div>
          <fieldset>
            <legend>Models</legend>
            <div class="row">
              <label class="grow">
                <span class="hidden">Find a model, or name one</span>
                <input
                  type="text"
                  placeholder="Find, or name one: acme/a@2"
                  value={wanted}
                  onInput={(e) => setWanted(e.currentTarget.value)}
                  onKeyDown={(e) => e.key === "Enter" && !e.ctrlKey && !e.metaKey && add(e)}
                />
              </label>
              <button type="button" disabled={!wanted.trim()} onClick={add}>
                Add
              </button>
            </div>
            <div class="models">
              {listed.map((name) => (
                <label key={name} class="check">
                  <input
                    type="checkbox"
                    checked={models.includes(name)}
                    disabled={busy || (!models.includes(name) && models.length >= MOST)}
                    onChange={(e) => toggle(name, e.currentTarget.checked)}
                  />{" "}
                  {name}
                </label>
              ))}
            </div>
            <p class="note">
              {models.length >= MOST ? `${MOST} at most, as browsers open no more connections. ` : ""}
              <button type="button" class="quiet" onClick={reload}>
                Look for models again
              </button>
            </p>
          </fieldset>
        </form>
        <div class="columns" ref={columns}>
          {models.map((m) => {
            const mine = turns.get(m) ?? [];
            return (
              <AnswerColumn
                key={m}
                model={m}
                turns={mine}
                settings={mine.length > 1 ? asked : sent}
                keyed={about.keyed}
                typed={typed}
                onTyped={(call, text) => setResults((all) => new Map(all).set(callKey(call), text))}
                onSend={() => goOn([m])}
                onAgain={() => answerTo(m, mine.slice(0, -1))}
              />
            );
          })}
          {waiting.length > 1 && (
            <div class="row all">
              <button type="button" class="main" disabled={!answered} onClick={() => goOn(waiting)}>
                Send the results of {waiting.length} models and go on
              </button>
              <span class="note">A result counts for every call with the same arguments.</span>
            </div>
          )}
        </div>
      </div>
    </>
  );
}

const last = (turns: Turn[]): Turn | undefined => turns[turns.length - 1];

/** Models that make the same call get the same result, which is typed once. */
const callKey = (call: Call): string => JSON.stringify([call.name, call.args]);

interface NumberProps {
  label: string;
  value: number | null;
  min: number;
  max: number;
  step: number;
  onValue: (value: number | null) => void;
}

function NumberField({ label, value, min, max, step, onValue }: NumberProps) {
  return (
    <label>
      <span>{label}</span>
      <input
        type="number"
        min={min}
        max={max}
        step={step}
        value={value ?? ""}
        placeholder="–"
        onInput={(e) => onValue(e.currentTarget.value === "" ? null : e.currentTarget.valueAsNumber)}
      />
    </label>
  );
}
