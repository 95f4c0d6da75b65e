// Whether somebody is at the page. One that is only open is read less often: what it takes is taken from a training on the same machine.

const AWAY_MS = 20_000; // without pointer, wheel and keyboard
let last = performance.now();
const waiting = new Set<() => void>();

export function attended(): boolean {
  return !document.hidden && performance.now() - last < AWAY_MS;
}

/** Calls `work` whenever somebody comes back; what is returned ends that. */
export function onReturn(work: () => void): () => void {
  waiting.add(work);
  return () => waiting.delete(work);
}

function seen(event: Event): void {
  const back = !attended() || event.type === "visibilitychange";
  last = performance.now();
  if (back && !document.hidden) for (const work of waiting) work();
}

for (const kind of ["pointermove", "pointerdown", "wheel", "keydown"]) addEventListener(kind, seen, { passive: true, capture: true });
document.addEventListener("visibilitychange", seen);
