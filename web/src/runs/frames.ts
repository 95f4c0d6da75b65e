// Work that can wait for a frame: as much of it as leaves the browser time to draw, the rest in the frames after it.

const BUDGET_MS = 6;
const waiting = new Map<object, () => void>();
let asked = false;

/** Does the work in one of the next frames. Work that is asked for again before that is done once, as asked for last. */
export function soon(owner: object, work: () => void): void {
  waiting.set(owner, work);
  if (asked) return;
  asked = true;
  requestAnimationFrame(turn);
}

export function never(owner: object): void {
  waiting.delete(owner);
}

function turn(): void {
  asked = false;
  const until = performance.now() + BUDGET_MS;
  for (const [owner, work] of waiting) {
    waiting.delete(owner);
    work();
    if (performance.now() >= until) break;
  }
  if (waiting.size === 0 || asked) return;
  asked = true;
  requestAnimationFrame(turn);
}
