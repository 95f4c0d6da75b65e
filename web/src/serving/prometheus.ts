// The text of /metrics as numbers. Names come with trimtab's prefix or, with --metrics vllm, with vLLM's; both are taken off.

export interface Sample {
  labels: Record<string, string>;
  value: number;
}

export type Samples = Map<string, Sample[]>;

export function parse(text: string): Samples {
  const found: Samples = new Map();
  for (const line of text.split("\n")) {
    const match = /^(?:trimtab_|vllm:)([A-Za-z0-9_:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels: Record<string, string> = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name!] = value!.replace(/\\(.)/g, (_, c: string) => (c === "n" ? "\n" : c));
    }
    const value = match[3] === "+Inf" ? Infinity : match[3] === "-Inf" ? -Infinity : Number(match[3]);
    const all = found.get(match[1]!) ?? [];
    all.push({ labels, value });
    found.set(match[1]!, all);
  }
  return found;
}

/** The sum over labels; null where the server has no such metric. */
export function total(samples: Samples, name: string): number | null {
  const all = samples.get(name);
  return all ? all.reduce((sum, s) => sum + s.value, 0) : null;
}

/** Between two readings of a histogram, or since the start where there is one alone: within what time shares of the observations were, as far
 * as its buckets tell. A bucket's upper edge is all that is known of what is in it: of one answer in 2.07 s, that it took 2.5 s at most. */
export function within(now: Samples, before: Samples | null, name: string, of: number[]): (number | null)[] {
  const counts = bucketed(now, name);
  const earlier = restarted(now, before, name) ? new Map<number, number>() : bucketed(before!, name);
  const edges = [...counts.keys()].sort((a, b) => a - b);
  const cumulative = edges.map((edge) => counts.get(edge)! - (earlier.get(edge) ?? 0));
  const all = cumulative[cumulative.length - 1] ?? 0;
  return of.map((q) => (all <= 0 ? null : edges[cumulative.findIndex((c) => c >= q * all)]!));
}

/** The mean of the same observations, which is exact. */
export function mean(now: Samples, before: Samples | null, name: string): number | null {
  const since = (what: string) => (total(now, what) ?? 0) - (restarted(now, before, name) ? 0 : (total(before!, what) ?? 0));
  const count = since(`${name}_count`);
  return count > 0 ? since(`${name}_sum`) / count : null;
}

/** Whether there is no reading of before, or the server has begun anew since. */
function restarted(now: Samples, before: Samples | null, name: string): boolean {
  const counts = bucketed(now, name);
  return !before || [...bucketed(before, name)].some(([edge, count]) => count > (counts.get(edge) ?? 0));
}

function bucketed(samples: Samples, name: string): Map<number, number> {
  const found = new Map<number, number>();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const edge = labels["le"] === "+Inf" ? Infinity : Number(labels["le"]);
    found.set(edge, (found.get(edge) ?? 0) + value);
  }
  return found;
}
