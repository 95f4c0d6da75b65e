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

/** Quantiles of a histogram's observations between two readings (since the start where there is one alone), within a bucket by a
 * straight line. null where there were none. */
export function quantiles(now: Samples, before: Samples | null, name: string, of: number[]): (number | null)[] {
  const counts = bucketed(now, name);
  let earlier = before ? bucketed(before, name) : new Map<number, number>();
  if ([...earlier].some(([edge, count]) => count > (counts.get(edge) ?? 0))) earlier = new Map(); // the server began anew in between
  const edges = [...counts.keys()].sort((a, b) => a - b);
  const cumulative = edges.map((edge) => counts.get(edge)! - (earlier.get(edge) ?? 0));
  const all = cumulative[cumulative.length - 1] ?? 0;
  return of.map((q) => {
    if (all <= 0) return null;
    const at = cumulative.findIndex((c) => c >= q * all);
    const high = edges[at]!;
    const low = at > 0 ? edges[at - 1]! : 0;
    if (!Number.isFinite(high)) return low;
    const under = at > 0 ? cumulative[at - 1]! : 0;
    return low + ((high - low) * (q * all - under)) / Math.max(1e-12, cumulative[at]! - under);
  });
}

function bucketed(samples: Samples, name: string): Map<number, number> {
  const found = new Map<number, number>();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const edge = labels["le"] === "+Inf" ? Infinity : Number(labels["le"]);
    found.set(edge, (found.get(edge) ?? 0) + value);
  }
  return found;
}
