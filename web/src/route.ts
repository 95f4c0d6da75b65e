// Where the page is: what stands behind # in the address, as a list of parts. Links are ordinary ones, so "back" and bookmarks work.

import { useEffect, useState } from "preact/hooks";

export function parts(hash: string): string[] {
  return hash
    .replace(/^#\/?/, "")
    .split("/")
    .filter(Boolean)
    .map((part) => {
      try {
        return decodeURIComponent(part);
      } catch {
        return part;
      }
    });
}

export function link(...to: string[]): string {
  return `#/${to.map(encodeURIComponent).join("/")}`;
}

export function useRoute(): string[] {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const changed = () => setHash(location.hash);
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return parts(hash);
}
