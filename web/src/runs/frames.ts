// Work that can wait: a piece of it in each frame, so that none takes longer than a frame.

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
    for (const [owner, work] of waiting) {
      waiting.delete(owner);
      work();
      break;
    }
    next();
  });
}
