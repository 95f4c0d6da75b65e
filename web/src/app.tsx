// The frame: which screens there are here, the key, and the screen that the address names.

import { useEffect, useRef, useState } from "preact/hooks";
import { type About, get, hasKey, onKeyWanted, setKey, takeKeyFromAddress } from "./api";
import { Command, Failure, useLoaded } from "./parts";
import { link, useRoute } from "./route";
import { AdapterList, AdapterPage } from "./adapters/adapters";
import { Playground } from "./playground/playground";
import { RunList } from "./runs/list";
import { RunPage } from "./runs/run";
import { ChooseRows } from "./rows/choose";
import { DataPage } from "./rows/data";
import { NewRun } from "./rows/new";
import { Serving } from "./serving/serving";

takeKeyFromAddress();

interface Screen {
  name: string;
  title: string;
  there: (about: About) => boolean;
}

const SCREENS: Screen[] = [
  { name: "runs", title: "Runs", there: (a) => a.runs },
  { name: "data", title: "Data", there: (a) => a.rows },
  { name: "new", title: "New run", there: (a) => a.rows },
  { name: "playground", title: "Playground", there: (a) => a.serves },
  { name: "adapters", title: "Adapters", there: (a) => a.store },
  { name: "serving", title: "Serving", there: (a) => a.serves },
];

export function App() {
  const route = useRoute();
  const { found: about, error } = useLoaded((signal) => get<About>("studio/about", {}, signal), []);
  const [asked, setAsked] = useState(false); // by the server, or by whoever pressed the button
  const [refused, setRefused] = useState(false);
  const [keyed, setKeyed] = useState(0); // counts keys given, so that screens load anew
  useEffect(
    () =>
      onKeyWanted(() => {
        setRefused(true);
        setAsked(true);
      }),
    [],
  );
  useEffect(() => {
    const changed = () => {
      if (!takeKeyFromAddress()) return; // an address with a key, put into a page that is open
      setAsked(false);
      setKeyed((count) => count + 1);
    };
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);

  const screens = about ? SCREENS.filter((s) => s.there(about)) : [];
  const here = screens.find((s) => s.name === route[0]) ?? screens[0];
  useEffect(() => {
    document.title = here ? `${[...route.slice(1, 2), here.title].join(" · ")} · trimtab` : "trimtab";
  }, [here, route.join("/")]);

  return (
    <>
      <a class="skip" href="#main" onClick={(e) => (e.preventDefault(), document.getElementById("main")?.focus())}>
        Skip to content
      </a>
      <header class="top">
        <a class="brand" href={link()} aria-label="trimtab: first screen">
          trimtab
        </a>
        <nav aria-label="Screens">
          {screens.map((s) => (
            <a key={s.name} href={link(s.name)} aria-current={s === here ? "page" : undefined}>
              {s.title}
            </a>
          ))}
        </nav>
        {about?.keyed && (
          <button type="button" class="quiet" onClick={() => (setRefused(false), setAsked(true))}>
            Key
          </button>
        )}
      </header>
      <main id="main" tabIndex={-1}>
        {error ? <Failure error={error} /> : null}
        {asked && (
          <KeyForm
            serves={!!about?.serves}
            other={!refused && hasKey()}
            onGiven={() => {
              setAsked(false);
              setKeyed(keyed + 1);
            }}
            onClosed={() => setAsked(false)}
          />
        )}
        {about && here && !(asked && about.serves && !hasKey()) && <Shown key={`${here.name} ${keyed}`} about={about} screen={here.name} route={route.slice(1)} />}
      </main>
      {about && <footer class="bottom">
          trimtab {about.version}
          {about.serves && (
            <>
              {" · "}
              <a href="docs">how to call this server</a>
            </>
          )}
        </footer>}
    </>
  );
}

function Shown({ about, screen, route }: { about: About; screen: string; route: string[] }) {
  if (screen === "runs") return route[0] ? <RunPage key={route[0]} ids={route[0].split("+")} changes={about.changes} /> : <RunList changes={about.changes} />;
  if (screen === "data") return route[1] ? <DataPage key={route.join("/")} kind={route[0]!} name={route[1]} /> : <ChooseRows />;
  if (screen === "new") return <NewRun about={about} path={route[0] ?? ""} />;
  if (screen === "playground") return <Playground about={about} />;
  if (screen === "adapters") return route[0] ? <AdapterPage key={route[0]} name={route[0]} about={about} /> : <AdapterList about={about} />;
  return <Serving about={about} />;
}

function KeyForm({ serves, other, onGiven, onClosed }: { serves: boolean; other: boolean; onGiven: () => void; onClosed: () => void }) {
  const [text, setText] = useState("");
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => field.current?.focus(), []); // autofocus is for a page that opens, not for what is shown later
  return (
    <form
      class="card key-form"
      aria-labelledby="key-title"
      onSubmit={(event) => {
        event.preventDefault();
        setKey(text);
        onGiven();
      }}
    >
      <h2 id="key-title">{other ? "Use another key" : "A key is needed"}</h2>
      <p class="note">
        {serves
          ? "Whoever runs this server has it: it was printed when the tenant was added, and cannot be shown again. A new one for a tenant:"
          : "It is in the address that was printed when the page was started, behind #key=."}
      </p>
      {serves && <Command text="trimtab tenants key-create NAME" />}
      <p class="note">It is kept in this page's memory only. Reloading the page forgets it.</p>
      <div class="row">
        <label class="grow">
          <span>Key</span>
          <input type="password" autoComplete="off" value={text} onInput={(e) => setText(e.currentTarget.value)} ref={field} />
        </label>
        <button type="submit" class="main" disabled={!text.trim()}>
          Use this key
        </button>
        <button type="button" onClick={onClosed}>
          Cancel
        </button>
      </div>
    </form>
  );
}
