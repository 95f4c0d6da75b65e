// What the server tells of runs: see trimtab/train/follow.py.

import { number } from "../format";

/** paused: all variants that have not ended are, and the run waits. */
export type State = "running" | "paused" | "finished" | "stopped";

export interface RunLine {
  id: string;
  name: string;
  path: string;
  state: State;
  base: string | null;
  variants: number;
  methods: string[];
  seconds: number | null;
  tokens: number | null;
  changed: number;
  error: string | null;
}

export interface Meaning {
  title: string;
  percent: boolean;
  better: "higher" | "lower" | null;
}

export const scoreTitle = (name: string, meaning: Meaning | undefined): string => `${name === "loss" ? "test loss" : (meaning?.title ?? name)}${meaning?.percent ? ", %" : ""}`;

export const scoreValue = (value: number | undefined, meaning: Meaning | undefined): string => (value !== undefined && meaning?.percent ? value.toFixed(1) : number(value));

export interface VariantFacts {
  name: string;
  data: string | null;
  method: string | null;
  objective: string | null;
  settings: Record<string, unknown>;
  total_steps: number | null;
  scores: Record<string, number>;
  valid: { metric: string | null; best: number | null; best_step: number | null; finished_early: string | null };
  steps: number | null;
  stopped: string | null;
  finished_early: string | null;
  trainable: number | null;
  adapter_bytes: number | null;
  seconds: number | null;
  tokens: number | null;
  tokens_per_s: number | null;
  saved_step: number | null;
  /** The run has ended and could not save it. */
  unsaved: boolean;
}

/** What is asked of a run, and what became of it: variant -> what, or clone -> why not. */
export interface Controls {
  takes: boolean;
  paused: string[];
  ended: Record<string, string>;
  refused: Record<string, string>;
  asked: Record<string, "stop" | "pause">;
  clones: string[];
}

export interface RunFacts {
  id: string;
  name: string;
  path: string;
  state: State;
  settings: Record<string, unknown>;
  base_fingerprint: { before?: string; after?: string };
  base_scores: Record<string, Record<string, number>>;
  scores: Record<string, Meaning>;
  variants: VariantFacts[];
  /** On the page, not in a report. */
  control: Controls;
  /** Whether it was begun from the page, so that what it prints is kept. */
  logged: boolean;
  answers: Record<string, string[]>;
  base: string | null;
  base_parameters: number | null;
  dtype: string | null;
  device: string | null;
  seconds: number | null;
  tokens: number | null;
  tokens_per_s: number | null;
  peak_memory_gb: number | null;
}

export type Columns = Record<string, (number | null)[]>;

export interface MetricsPart {
  variants: Record<string, { steps: Columns; valid: Columns }>;
  next: number;
  mark: string;
  more: boolean;
  restart: boolean;
  state: State;
  written: string;
}

/** A variant as the page shows it: number tells colour and dash, label the run too where there are several. */
export interface Shown {
  number: number;
  label: string;
  run: RunFacts;
  facts: VariantFacts;
}

/** Sets of rows that have answers, in the order of the variants that learn them: an object has a set called "10" before all others. */
export function answeredSets(run: RunFacts): string[] {
  const known = run.variants.flatMap((v) => (v.data !== null && Object.hasOwn(run.answers, v.data) ? [v.data] : []));
  return [...new Set([...known, ...Object.keys(run.answers)])];
}
