// A colour and a dash for each variant: eight hues, then the same with dashes, so that 32 can be told apart.

const LIGHT = ["#2158d0", "#c2410c", "#0b7a52", "#a3129a", "#8a6100", "#077087", "#c81e3a", "#6531c9"];
const DARK = ["#82aaff", "#ff9d5c", "#52d6a1", "#ef86e8", "#e6b94a", "#4fd3e6", "#ff7f8e", "#b69cff"];
const DASHES = [[], [9, 4], [2, 3], [10, 3, 2, 3]];

const scheme = matchMedia("(prefers-color-scheme: dark)");

export function isDark(): boolean {
  return scheme.matches;
}

export function onSchemeChange(changed: () => void): () => void {
  scheme.addEventListener("change", changed);
  return () => scheme.removeEventListener("change", changed);
}

export function colour(number: number): string {
  const palette = isDark() ? DARK : LIGHT;
  return palette[number % palette.length]!;
}

export function dash(number: number): number[] {
  return DASHES[Math.floor(number / LIGHT.length) % DASHES.length]!;
}

export function themed(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
