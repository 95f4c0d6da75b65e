// Whether a run is running, in a word.

import type { State } from "./types";

export function StateMark({ state }: { state: State }) {
  return <span class={`state ${state}`}>{state}</span>;
}
