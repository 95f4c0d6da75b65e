// Where answers come from: the server that the page came from, or the file that a report is.

import { get } from "../api";

export interface Answer {
  text: string;
  right: boolean | null;
  reward?: number;
}

export interface AnswerRow {
  row: number;
  prompt: string;
  reference: string;
  answers: Record<string, Answer>;
}

/** total: how many rows there are to go through; rows: how many were answered, if some are not told. */
export interface FoundAnswers {
  rows: AnswerRow[];
  total: number;
  answered?: number;
  wrong: Record<string, number>;
}

/** labels, and of base and variants how often a row of label `labels[cell[0]]` was given `labels[cell[1]]`; null: something that is no label. */
export interface Confusion {
  labels: string[];
  of: Record<string, [number, number | null, number][]>;
}

/** who: of this one alone, "" for all. */
export interface Source {
  answers(run: string, data: string, who: string, start: number, count: number): Promise<FoundAnswers>;
  confusion(run: string, data: string): Promise<Confusion | null>;
}

export const server: Source = {
  answers: (id, data, who, start, count) => get("studio/answers", { id, data, who, start, count }),
  confusion: async (id, data) => (await get<{ confusion: Confusion | null }>("studio/confusion", { id, data })).confusion,
};
