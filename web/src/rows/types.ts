// What the server tells of rows: see trimtab/train/shown_rows.py.

export interface Finding {
  level: "error" | "warning" | "note";
  where: string;
  message: string;
  items: string[];
  count: number;
  fix: string;
}

export interface SourceFacts {
  path: string;
  weight: number;
  read: number;
  dropped: number;
  drawn: number;
  tokens: number;
  supervised: number;
}

export interface LengthFacts {
  width: number;
  kept: number[];
  over: number[];
  cut: number;
}

export interface SplitFacts {
  name: string;
  rows: number;
  tokens: number;
  supervised: number;
  sources: SourceFacts[];
  quantiles: Record<string, number>;
  lengths: LengthFacts;
  dropped: { kind: string; count: number; fix: string }[];
}

export interface DataFacts {
  name: string;
  max_length: number;
  splits: SplitFacts[];
}

export interface VariantCost {
  name: string;
  method: string;
  data: string;
  rows_per_epoch: number;
  steps: number;
  tokens: number;
  tokens_per_step: number;
  trainable: number;
  adapter_bytes: number;
  flops: number;
  seconds: [number, number];
}

export interface Estimate {
  dtype: string;
  device: string;
  forward_tokens: number;
  memory_bytes: [number, number];
  process_bytes: number;
  available_bytes: number;
  probe_flops: number;
  seconds: [number, number];
  judging_seconds: [number, number];
  answers: number;
}

export interface Report {
  base: string;
  base_parameters: number;
  max_positions: number;
  data: DataFacts[];
  findings: Finding[];
  variants: VariantCost[];
  estimate: Estimate | null;
  room: string | null;
  seconds: number;
}

export interface ReadingState {
  state: "reading" | "ready" | "failed";
  status: string;
  seconds: number;
  report: Report | null;
  error: string | null;
}

/** A text and its bits: 1, its tokens are supervised; 2, the chat template wrote it. */
export type TextRun = [string, number];

export interface Row {
  number: number;
  origin: string;
  tokens: number;
  targets: number;
  segments: { role: string; goes_on: boolean; runs: TextRun[] }[];
}

export interface Lost {
  origin: string;
  reason: string;
}
