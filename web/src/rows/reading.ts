// Rows that the server reads for this page: begun by a request, then asked for until they are there.

import { useEffect, useRef, useState } from "preact/hooks";
import { get, post } from "../api";
import type { ReadingState } from "./types";

const POLL_MS = 500;

export interface Reading extends Partial<ReadingState> {
  key?: string;
  subject?: string;
}

/** What comes of `begin`, anew whenever `depends` change; nothing while begin is null. */
export function useReading(path: string, body: object | null, depends: unknown[]): { reading: Reading | null; failed: unknown; again: () => void } {
  const [reading, setReading] = useState<Reading | null>(null);
  const [failed, setFailed] = useState<unknown>(null);
  const [count, setCount] = useState(0);
  const latest = useRef(body);
  latest.current = body;
  useEffect(() => {
    setReading(null);
    setFailed(null);
    if (!latest.current) return undefined;
    let over = false;
    let timer = 0;
    const follow = async (key: string, subject: string | undefined) => {
      try {
        const told = await get<ReadingState>("studio/rows/state", { key });
        if (over) return;
        setReading({ ...told, key, subject });
        if (told.state === "reading") timer = window.setTimeout(() => void follow(key, subject), POLL_MS);
      } catch (error) {
        if (!over) setFailed(error);
      }
    };
    post<Reading & { key: string }>(path, latest.current).then(
      (told) => {
        if (over) return;
        setReading(told);
        timer = window.setTimeout(() => void follow(told.key, told.subject), 100);
      },
      (error: unknown) => !over && setFailed(error),
    );
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, [count, ...depends]);
  return { reading, failed, again: () => setCount(count + 1) };
}
