"""What Prometheus reads at /metrics: vLLM's names with a prefix of our own, and metrics that only a server of many adapters has.

`trimtab_e2e_request_latency_seconds` means the same as `vllm:e2e_request_latency_seconds`, so dashboards work after the prefix is replaced.
On request metrics that vLLM has too have vLLM's names, for dashboards and gateways that know only those; `vllm:lora_requests_info` is one
more of these, by which gateways route. Current values and totals are read from the engine on request; times are observed as requests end.
Labels are bounded: the model's name, a fixed list of reasons, and MAX_TENANTS tenants.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab.serve.admission import Admission
from trimtab.serve.audit import Audit
from trimtab.serve.keys import redacted
from trimtab.serve.request import FinishReason, Request, Usage
from trimtab.serve.stats import EngineStats, StepFacts
from trimtab.serve.usage import UsageBook

PREFIX, VLLM_PREFIX = "trimtab_", "vllm:"
OF_VLLM = frozenset(
    (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits"),
        *("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
        *("num_preemptions", "prompt_tokens", "generation_tokens", "request_success", "time_to_first_token_seconds"),
        *("inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens", "iteration_tokens"),
    )
)
IN_VLLM = {"iteration_tokens": "iteration_tokens_total"}
"""Where vLLM's name is none that Prometheus' conventions have."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TENANTS = MAX_ADAPTERS = 100
OTHER = "(other)"
"""The label of all tenants beyond the first MAX_TENANTS, and of reasons that are not in REASONS; no tenant can have this name."""
REASONS = ("auth", "forbidden", "not_found", "invalid", "too_large", "concurrency", "tokens", "full", "draining", "database", OTHER)
FINISHED = {"cancelled": "abort"}
"""Where vLLM has another word for how a request ended."""

# vLLM's buckets, in seconds, so that its dashboards' quantiles are as fine here.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """The metrics of one server, in a registry of its own. model: the base's name. stats: the engine's, asked at each reading. vllm: under
    vLLM's names where it has them. max_running: answers at a time, which may all have adapters of their own. block_size: tokens of a KV
    block.

    Give `finished` and `stepped` to the engine as its on_finish and on_step, and call `rejected` for what is refused by others than
    `admission`. ignored: requests with fields that nobody read; count them there.
    """

    def __init__(
        self,
        model: str,
        stats: Callable[[], EngineStats],
        *,
        admission: Admission | None = None,
        audit: Audit | None = None,
        usage: UsageBook | None = None,
        vllm: bool = False,
        max_running: int = 0,
        block_size: int = 0,
    ):
        self.registry, self._model, self._vllm, self._max_running = CollectorRegistry(), model, vllm, max_running
        self._block_size = block_size
        self._stats, self._admission, self._audit, self._usage = stats, admission, audit, usage
        # Each key is there from the start: these grow on other threads while `_read` goes through them.
        self._rejects = Counter[str](dict.fromkeys(REASONS, 0))
        self._finished = Counter[str](dict.fromkeys(map(_finish_label, get_args(FinishReason)), 0))
        self.ignored = 0
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN)
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.", PER_TOKEN)
        self._per_token = self._histogram("request_time_per_output_token_seconds", "Mean of an answer's later tokens.", PER_TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival until the request first ran.", WHOLE)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of prompts.", TOKENS)
        self._rows = self._histogram("iteration_tokens", "Token rows of a step.", TOKENS)
        self._completion = self._histogram("request_generation_tokens", "Tokens of answers.", TOKENS)
        self.registry.register(_Reading(self._read))

    def finished(
        self,
        request: Request,
        usage: Usage,
        finish: FinishReason,
        queue_s: float,
        ttft_s: float | None,
        total_s: float,
        gaps: Sequence[float],
    ) -> None:
        """`Engine.on_finish`: a request has ended. Times in seconds, ttft_s None if no token came; gaps: between its tokens."""
        self._finished[_finish_label(finish)] += 1
        self._whole.observe(total_s)
        self._queue.observe(queue_s)
        if ttft_s is not None:
            self._first_token.observe(ttft_s)
            self._prompt.observe(usage.prompt)
            self._completion.observe(usage.completion)
        for gap in gaps:
            self._gap.observe(gap)
        if gaps:
            self._per_token.observe(sum(gaps) / len(gaps))

    def stepped(self, facts: StepFacts) -> None:
        """`Engine.on_step`: a step has run."""
        self._rows.observe(facts.prefill_rows + facts.decode_rows)

    def rejected(self, reason: str) -> None:
        """A request was refused before it reached the engine; reason: one of REASONS."""
        self._rejects[reason if reason in REASONS else OTHER] += 1

    def text(self) -> bytes:
        """Everything, in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, says: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(self._name(name), says, ["model_name"], buckets=buckets, registry=self.registry).labels(self._model)

    def _read(self) -> Iterable[Metric]:
        s = self._stats()
        blocks = max(1, s.kv_blocks_total)
        yield self._gauge("num_requests_running", "Requests that hold KV blocks.", s.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a place.", s.waiting)
        yield self._gauge("num_requests_loading", "Adapters that are being read and packed.", s.loading)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use by requests, 0 to 1.", s.kv_blocks_used / blocks)
        yield self._gauge(
            "kv_cache_cached_perc", "Share of the KV blocks kept for prompts that begin alike, 0 to 1.", s.kv_blocks_cached / blocks
        )
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", s.prefix_query_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens found there.", s.prefix_hit_tokens)
        yield self._counter("num_preemptions", "Requests that lost their KV blocks and began again.", s.preemptions)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens that were drafted and verified.", s.drafted_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "Those of them that were right.", s.accepted_tokens)
        yield self._counter("prompt_tokens", "Prompt tokens of requests that have begun.", s.prompt_tokens)
        yield self._counter("generation_tokens", "New tokens.", s.generation_tokens)
        yield self._counter("engine_steps", "Forwards of the engine.", s.steps)
        yield self._counter("engine_step_errors", "Steps that failed.", s.step_errors)
        yield self._labelled("forward_rows", "Token rows of forwards, by the path that they ran.", "path", s.rows_by_path)
        yield self._labelled("request_success", "Requests that ended, by how.", "finished_reason", self._finished)
        yield from self._read_adapters(s)
        yield from self._read_tenants(s.tenant_tokens)
        yield from self._read_server()
        if self._vllm:
            yield self._adapters_info(s)
            yield self._cache_info(s)

    def _adapters_info(self, s: EngineStats) -> Metric:
        """vLLM's: the adapters of running and of waiting requests as labels; the value is the time."""
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily(VLLM_PREFIX + "lora_requests_info", "Adapters of running and waiting requests.", labels=labels)
        told = [redacted(",".join(names[:MAX_ADAPTERS])) for names in (s.adapters_running, s.adapters_waiting)]
        family.add_metric([str(self._max_running), *told], time.time())
        return family

    def _cache_info(self, s: EngineStats) -> Metric:
        """vLLM's: how the KV cache is cut, as labels. Gateways find out by it which prompts a server may still hold."""
        says = "Size and number of the KV blocks."
        family = GaugeMetricFamily(VLLM_PREFIX + "cache_config_info", says, labels=["block_size", "num_gpu_blocks"])
        family.add_metric([str(self._block_size), str(s.kv_blocks_total)], 1)
        return family

    def _read_adapters(self, s: EngineStats) -> Iterable[Metric]:
        yield self._gauge("adapters_resident", "Adapters in memory.", s.adapters_resident)
        yield self._gauge("adapter_leases", "Requests that use one of them.", s.adapter_leases)
        yield self._gauge("adapter_resident_bytes", "What they take.", s.adapter_bytes)
        yield self._gauge("adapter_budget_bytes", "What they may take.", s.adapter_budget_bytes)
        yield self._counter("adapter_loads", "Adapters read and packed.", s.loads)
        yield self._counter("adapter_load_failures", "Adapters that were refused at loading.", s.load_failures)
        yield self._counter("adapter_load_seconds", "Time that loading took.", s.load_seconds)
        yield self._counter("adapter_evictions", "Adapters put out of memory.", s.evictions)

    def _read_tenants(self, tokens: Mapping[str, tuple[int, int]]) -> Iterable[Metric]:
        """The first tenants by name, in the order in which they came, which never changes: so no total ever falls."""
        prompt, new = Counter[str](), Counter[str]()
        for i, (tenant, (p, n)) in enumerate(tokens.items()):
            label = tenant if i < MAX_TENANTS else OTHER
            prompt[label] += p
            new[label] += n
        yield self._labelled("tenant_prompt_tokens", "Prompt tokens by tenant.", "tenant", prompt)
        yield self._labelled("tenant_generation_tokens", "New tokens by tenant.", "tenant", new)

    def _read_server(self) -> Iterable[Metric]:
        rejects = Counter[str](self._rejects)
        if self._admission is not None:
            rejects.update({str(reason): count for reason, count in self._admission.rejects.items()})
            yield self._gauge("open_answers", "Answers that have been admitted and not ended.", self._admission.open)
            if (leases := self._admission.leases) is not None:
                yield self._gauge("servers", "Servers that share the limits of tenants, this one included.", leases.servers)
                yield self._gauge("limits_failing", "1 while shared limits cannot be exchanged.", bool(leases.problem))
        yield self._counter("requests_with_ignored_fields", "Requests with fields that nobody reads.", self.ignored)
        yield self._labelled("requests_rejected", "Requests refused before they reached the engine, by reason.", "reason", rejects)
        if self._audit is not None:
            yield self._gauge("audit_failing", "1 while the audit log cannot be written.", bool(self._audit.problem))
            yield self._counter("audit_lost_lines", "Lines that the audit log could not take.", self._audit.lost)
        if self._usage is not None:
            yield self._gauge("usage_failing", "1 while usage is kept in memory because it cannot be written.", bool(self._usage.problem))

    def _name(self, name: str) -> str:
        return VLLM_PREFIX + IN_VLLM.get(name, name) if self._vllm and name in OF_VLLM else PREFIX + name

    def _gauge(self, name: str, says: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._name(name), says, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, says: str, value: float) -> Metric:
        family = CounterMetricFamily(self._name(name), says, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _labelled(self, name: str, says: str, label: str, values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(self._name(name), says, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self._model, redacted(key)], value)
        return family


class _Reading(Collector):
    """Asks for current values when the metrics are read."""

    def __init__(self, read: Callable[[], Iterable[Metric]]):
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()

    def describe(self) -> Iterable[Metric]:
        return ()  # the engine is not asked before somebody reads


def _finish_label(finish: str) -> str:
    return FINISHED.get(finish, finish)
