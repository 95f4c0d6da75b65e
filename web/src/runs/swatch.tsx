// The mark of a variant beside its name: its colour and its dash.

import { useEffect, useState } from "preact/hooks";
import { colour, dash, onSchemeChange } from "./colours";

export function Swatch({ number }: { number: number }) {
  const [, again] = useState(0);
  useEffect(() => onSchemeChange(() => again((n) => n + 1)), []);
  return (
    <svg class="swatch" viewBox="0 0 22 10" aria-hidden="true" focusable="false">
      <line x1="1" y1="5" x2="21" y2="5" stroke={colour(number)} stroke-width="3" stroke-dasharray={dash(number).join(" ") || undefined} />
    </svg>
  );
}
