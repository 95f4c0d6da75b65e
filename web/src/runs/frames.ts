// Work that can wait: as many pieces of it in each frame as take little of it, so that none takes longer than a frame. A frame has a cost of
// its own: the browser lays out, copies what is drawn, and shows it.

const ENOUGH_MS = 4; // after so much in a frame, no other piece is begun

/** Time that pieces have taken in all, ms. */
export let spent = 0;

const waiting = new Map<object, () => void>();
let asked = false;

/** Does the work in one of the next frames, after what waits already. Asked for again before that, it is done once, as asked for last. */
export function soon(owner: object, work: () => void): void {
  waiting.set(owner, work);
  next();
}

export function never(owner: object): void {
  waiting.delete(owner);
}

function next(): void {
  if (asked || waiting.size === 0) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    const begun = performance.now();
    for (const [owner, work] of waiting) {
      waiting.delete(owner);
      work();
      if (performance.now() - begun >= ENOUGH_MS) break;
    }
    spent += performance.now() - begun;
    next();
  });
}
