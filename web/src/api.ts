// Requests to the server that this page came from. The key is kept in memory alone: a reload forgets it.

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

let key = "";
let askForKey: () => void = () => {};

export function setKey(given: string): void {
  key = given.trim();
}

export function hasKey(): boolean {
  return key !== "";
}

/** Called where the server says that it wants a key, or another one. */
export function onKeyWanted(ask: () => void): void {
  askForKey = ask;
}

/** A key behind #key= in the address: taken, and gone from the address and the browser's history. False if there is none. */
export function takeKeyFromAddress(): boolean {
  const found = /^#key=([^&]+)$/.exec(location.hash);
  if (!found) return false;
  setKey(decoded(found[1]!));
  history.replaceState(null, "", location.pathname + location.search);
  return true;
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a % that was not written as %25
  }
}

export type Parameters = Record<string, string | number | boolean | undefined>;

function address(path: string, parameters: Parameters = {}): string {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) if (value !== undefined) query.set(name, String(value));
  const text = query.toString();
  return new URL(path + (text ? `?${text}` : ""), document.baseURI).href;
}

export async function request(path: string, options: RequestInit = {}, parameters: Parameters = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  if (key) headers.set("authorization", `Bearer ${key}`);
  let answer: Response;
  try {
    answer = await fetch(address(path, parameters), { ...options, headers, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer: it has ended, or the network is down");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    askForKey(); // what the server says is for those who call it without a page
    throw new ApiError(401, key ? "This key is not known here, or has ended." : "A key is needed: give it above.");
  }
  throw new ApiError(answer.status, await told(answer));
}

async function told(answer: Response): Promise<string> {
  const text = await answer.text();
  try {
    const message: unknown = JSON.parse(text).error.message;
    if (typeof message === "string") return message;
  } catch {
    // no error of this server's: a proxy's, say
  }
  return `${answer.status} ${answer.statusText}`;
}

export async function get<T>(path: string, parameters: Parameters = {}, signal?: AbortSignal): Promise<T> {
  return (await request(path, signal ? { signal } : {}, parameters)).json() as Promise<T>;
}

/** Asks the server to do something. */
export async function post<T>(path: string, body: object, signal?: AbortSignal): Promise<T> {
  const options: RequestInit = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  if (signal) options.signal = signal;
  return (await request(path, options)).json() as Promise<T>;
}

export interface About {
  version: string;
  keyed: boolean;
  runs: boolean;
  /** Whether runs can be begun and told what to do here. */
  changes: boolean;
  rows: boolean;
  store: boolean;
  serves: boolean;
}
