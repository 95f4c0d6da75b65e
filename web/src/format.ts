// Numbers and times as people read them, and texts as a shell takes them.

export function number(value: number | null | undefined, digits = 4): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return Number(value.toPrecision(Math.max(2, digits - 1))).toExponential().replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(digits)));
}

/** 1234567 as "1.23 M". */
export function short(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  for (const [unit, name] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]] as const) {
    if (Math.abs(value) >= unit) return Number((value / unit).toPrecision(3)) + name;
  }
  return number(value, 3);
}

export function bytes(value: number | null | undefined): string {
  return value === null || value === undefined ? "–" : short(value) + (Math.abs(value) >= 1000 ? "B" : " B");
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts[0] ? `${parts[0]} h ${parts[1]} min` : `${parts[1]} min ${parts[2]} s`;
}

/** How long ago, from seconds since 1970. */
export function ago(time: number): string {
  const passed = Math.max(0, Date.now() / 1000 - time);
  if (passed < 60) return "just now";
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  return new Date(time * 1000).toISOString().slice(0, 10);
}

/** A setting as it was given: 20240101 and 20240102 are two seeds. */
export function value(x: unknown): string {
  if (x === null || x === undefined) return "–";
  if (Array.isArray(x) && x.length) return x.map(entry).join(", ");
  return typeof x === "string" ? x : JSON.stringify(x);
}

/** An entry of a list. Of a source of rows, its path and what else is said of it. */
function entry(x: unknown): string {
  if (typeof x !== "object" || x === null || !("path" in x) || typeof x.path !== "string") return typeof x === "string" ? x : JSON.stringify(x);
  const said = Object.entries(x).filter(([k, v]) => k !== "path" && v !== null && v !== false && !(k === "weight" && v === 1) && JSON.stringify(v) !== "{}");
  return [x.path, ...said.map(([k, v]) => `${k} ${value(v)}`)].join(" · ");
}

/** One word of a command line, quoted where the shell would read it otherwise. */
export function quoted(word: string): string {
  return /^[A-Za-z0-9_./:=@%+,-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

/** What a record holds under a name that a user has chosen, which may be `constructor`: every object has that. */
export function own<T>(record: Readonly<Record<string, T>>, name: string): T | undefined {
  return Object.hasOwn(record, name) ? record[name] : undefined;
}
