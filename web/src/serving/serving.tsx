// Load, latency, residency and the KV cache of this server, from /metrics; tenants from the admin routes where there are some.

import { useMemo, useState } from "preact/hooks";
import { type About, ApiError, get, request } from "../api";
import { bytes, duration, number, short } from "../format";
import { Command, Facts, Failure, Section, Table, usePoll } from "../parts";
import { Chart, type Curve, type Range } from "../runs/chart";
import { mean, parse, type Samples, total, within } from "./prometheus";

const EVERY_MS = 2000;
const KEPT = 900; // readings: half an hour
const LATENCIES: [string, string][] = [
  ["time_to_first_token_seconds", "first token"],
  ["inter_token_latency_seconds", "between tokens"],
  ["request_queue_time_seconds", "waiting for a place"],
  ["e2e_request_latency_seconds", "whole answer"],
];

interface Reading {
  time: number;
  samples: Samples;
}

interface TenantLine {
  name: string;
  namespaces: string[];
  max_concurrent: number | null;
  tokens_per_minute: number | null;
  weight: number;
  admin: boolean;
}

export function Serving({ about }: { about: About }) {
  const [readings, setReadings] = useState<Reading[]>([]);
  const [tenants, setTenants] = useState<TenantLine[] | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [range, setRange] = useState<Range>(null);
  usePoll(
    async () => {
      try {
        const samples = parse(await (await request("metrics")).text());
        setReadings((all) => [...all.slice(-KEPT + 1), { time: performance.now() / 1000, samples }]);
        if (about.keyed && tenants === null) setTenants(await get<TenantLine[]>("admin/tenants"));
        setError(null);
      } catch (failed) {
        setError(failed);
      }
    },
    EVERY_MS,
    [],
  );
  const last = readings[readings.length - 1];
  if (!last) {
    if (error instanceof ApiError && error.status === 403) return <Failure error="Load is shown to administrators: give the key of an admin tenant." />;
    return error ? <Failure error={error} /> : <p class="note">Reading…</p>;
  }
  const s = last.samples;
  const where = `curl ${new URL("metrics", document.baseURI).href}${about.keyed ? ' -H "authorization: Bearer $TRIMTAB_KEY"' : ""}`;
  return (
    <>
      <h1>Serving</h1>
      {error ? <Failure error={error} /> : null}
      <Tiles s={s} readings={readings} />
      <Section title="Load" id="load">
        <Load readings={readings} range={range} onRange={setRange} />
      </Section>
      <Latency s={s} readings={readings} />
      <Adapters s={s} />
      <Refused s={s} />
      {tenants && <Tenants tenants={tenants} s={s} />}
      <Command text={where} says="In a terminal" />
    </>
  );
}

function Tiles({ s, readings }: { s: Samples; readings: Reading[] }) {
  const rate = (name: string) => rates(readings.slice(-6), name).findLast(Number.isFinite) ?? null;
  const kv = total(s, "kv_cache_usage_perc");
  const cached = total(s, "kv_cache_cached_perc");
  const tiles: [string, string, string][] = [
    ["answering", number(total(s, "num_requests_running")), `${number(total(s, "num_requests_waiting"))} waiting`],
    ["new tokens/s", number(rate("generation_tokens_total"), 3), `${number(rate("prompt_tokens_total"), 3)} of prompts`],
    ["KV cache in use", kv === null ? "–" : `${(kv * 100).toFixed(0)}%`, cached === null ? "" : `${(cached * 100).toFixed(0)}% kept for prompts alike`],
    ["adapters in memory", number(total(s, "adapters_resident")), `${bytes(total(s, "adapter_resident_bytes"))} of ${bytes(total(s, "adapter_budget_bytes"))}`],
    ["prompt tokens found", hits(s), "in the prefix cache"],
  ];
  return (
    <dl class="tiles">
      {tiles.map(([name, value, more]) => (
        <div key={name} class="card">
          <dt>{name}</dt>
          <dd>{value}</dd>
          <dd class="note">{more}</dd>
        </div>
      ))}
    </dl>
  );
}

function hits(s: Samples): string {
  const [asked, found] = [total(s, "prefix_cache_queries_total"), total(s, "prefix_cache_hits_total")];
  return asked && found !== null ? `${((100 * found) / asked).toFixed(0)}%` : "–";
}

function Load({ readings, range, onRange }: { readings: Reading[]; range: Range; onRange: (range: Range) => void }) {
  const curves = useMemo(() => {
    const start = readings[0]!.time;
    const x = readings.map((r) => r.time - start);
    const gauge = (name: string, label: string, n: number, times = 1): Curve => ({
      number: n,
      label,
      line: { x, y: readings.map((r) => (total(r.samples, name) ?? NaN) * times) },
    });
    const rate = (name: string, label: string, n: number): Curve => ({ number: n, label, line: { x, y: rates(readings, name) } });
    return {
      tokens: [rate("generation_tokens_total", "new", 0), rate("prompt_tokens_total", "of prompts", 1)],
      requests: [gauge("num_requests_running", "answering", 0), gauge("num_requests_waiting", "waiting", 1), gauge("num_requests_loading", "loading an adapter", 2)],
      kv: [gauge("kv_cache_usage_perc", "in use", 0, 100), gauge("kv_cache_cached_perc", "kept for prompts alike", 1, 100)],
    };
  }, [readings]);
  if (readings.length < 2) return <p class="note">The first values come in two seconds.</p>;
  const shared = { xTitle: "second", range, onRange, height: 190, group: "serving", legend: true };
  return (
    <div class="charts">
      <Chart title="tokens/s" curves={curves.tokens} {...shared} />
      <Chart title="requests" curves={curves.requests} {...shared} />
      <Chart title="KV cache, %" curves={curves.kv} {...shared} />
    </div>
  );
}

/** What a counter grew by a second, between each reading and the one before. */
function rates(readings: Reading[], name: string): number[] {
  return readings.map((r, i) => {
    const before = readings[i - 1];
    const [now, then] = [total(r.samples, name), before ? total(before.samples, name) : null];
    return before && now !== null && then !== null && now >= then ? (now - then) / (r.time - before.time) : NaN;
  });
}

function Latency({ s, readings }: { s: Samples; readings: Reading[] }) {
  const last = readings[readings.length - 1]!;
  const before = readings.find((r) => r !== last && last.time - r.time <= 60)?.samples ?? null; // a hidden page reads nothing
  const of = [0.5, 0.9, 0.99];
  const rows = LATENCIES.map(([name, title]) => ({
    name,
    title,
    recent: before ? within(s, before, name, of) : of.map(() => null),
    recentMean: before ? mean(s, before, name) : null,
    ever: within(s, null, name, of),
    everMean: mean(s, null, name),
    count: total(s, `${name}_count`),
  }));
  type Row = (typeof rows)[number];
  return (
    <Section title="Latency" id="latency">
      <p class="note">
        Means are exact. The server counts times in ranges, so of half, 90% and 99% of the answers the page knows the end of the range that they were
        within. 1 min: in the last minute; all: since the server began.
      </p>
      <Table
        label="Latency quantiles"
        rows={rows}
        rowKey={(r) => r.name}
        columns={[
          { key: "title", title: "time", cell: (r: Row) => r.title },
          { key: "rm", title: "mean, 1 min", number: true, cell: (r: Row) => duration(r.recentMean) },
          ...of.map((q, i) => ({ key: `r${q}`, title: `${q * 100}%, 1 min`, number: true, cell: (r: Row) => atMost(r.recent[i]) })),
          { key: "em", title: "mean, all", number: true, cell: (r: Row) => duration(r.everMean) },
          ...of.map((q, i) => ({ key: `e${q}`, title: `${q * 100}%, all`, number: true, cell: (r: Row) => atMost(r.ever[i]) })),
          { key: "count", title: "measured", number: true, cell: (r: Row) => number(r.count) },
        ]}
      />
    </Section>
  );
}

/** The end of a histogram's range; the last one has none. */
function atMost(edge: number | null | undefined): string {
  if (edge === null || edge === undefined) return "–";
  return Number.isFinite(edge) ? `≤ ${duration(edge)}` : "longer than all ranges";
}

function Adapters({ s }: { s: Samples }) {
  const loads = total(s, "adapter_loads_total");
  const seconds = total(s, "adapter_load_seconds_total");
  const facts: [string, string][] = [
    ["in memory", number(total(s, "adapters_resident"))],
    ["used by requests", number(total(s, "adapter_leases"))],
    ["memory", bytes(total(s, "adapter_resident_bytes"))],
    ["memory at most", bytes(total(s, "adapter_budget_bytes"))],
    ["loads", number(loads)],
    ["a load takes", loads && seconds !== null ? duration(seconds / loads) : "–"],
    ["put out of memory", number(total(s, "adapter_evictions_total"))],
    ["refused at loading", number(total(s, "adapter_load_failures_total"))],
  ];
  return (
    <Section title="Adapters in memory" id="residency">
      <Facts look="facts" facts={facts} />
    </Section>
  );
}

function Refused({ s }: { s: Samples }) {
  const reasons = [...(s.get("requests_rejected_total") ?? []).map((x) => ({ what: `refused: ${x.labels["reason"]}`, count: x.value }))];
  const ends = [...(s.get("request_success_total") ?? []).map((x) => ({ what: `ended: ${x.labels["finished_reason"]}`, count: x.value }))];
  const rows = [...ends, ...reasons].filter((r) => r.count > 0);
  return (
    <Section title="How requests ended" id="ends">
      {rows.length ? (
        <Table
          narrow
          label="Requests by how they ended"
          rows={rows}
          rowKey={(r) => r.what}
          columns={[
            { key: "what", title: "requests", cell: (r) => r.what },
            { key: "count", title: "number", number: true, cell: (r) => number(r.count) },
          ]}
        />
      ) : (
        <p class="note">None has ended yet.</p>
      )}
    </Section>
  );
}

function Tenants({ tenants, s }: { tenants: TenantLine[]; s: Samples }) {
  const used = (name: string, tenant: string) => s.get(name)?.find((x) => x.labels["tenant"] === tenant)?.value ?? null;
  return (
    <Section title="Tenants" id="tenants">
      <Table
        label="All tenants"
        rows={tenants}
        rowKey={(t) => t.name}
        columns={[
          { key: "name", title: "tenant", cell: (t) => t.name + (t.admin ? " (admin)" : "") },
          { key: "spaces", title: "namespaces", cell: (t) => t.namespaces.join(", ") || "–" },
          { key: "share", title: "share", number: true, cell: (t) => number(t.weight) },
          { key: "answers", title: "answers at a time", number: true, cell: (t) => (t.max_concurrent === null ? "any" : number(t.max_concurrent)) },
          { key: "limit", title: "tokens a minute", number: true, cell: (t) => (t.tokens_per_minute === null ? "any" : short(t.tokens_per_minute)) },
          { key: "prompt", title: "prompt tokens", number: true, cell: (t) => short(used("tenant_prompt_tokens_total", t.name)) },
          { key: "new", title: "new tokens", number: true, cell: (t) => short(used("tenant_generation_tokens_total", t.name)) },
        ]}
      />
      <p class="note">
        Tokens since this server began. <code>trimtab tenants usage</code> has them by day.
      </p>
      <Command text="trimtab tenants list" says="In a terminal" />
    </Section>
  );
}
