"""What an engine tells of itself: what a step was, where everything stands."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_TENANTS = 1000
OTHER = "(other)"
"""Tenants beyond the first MAX_TENANTS are counted together."""


@dataclass(frozen=True)
class StepFacts:
    """One step: how long it took, how many rows were prompts, how many decoded, and how many sequences ran."""

    seconds: float
    prefill_rows: int
    decode_rows: int
    sequences: int


@dataclass(frozen=True)
class EngineStats:
    """Where everything stands, and counts since the start. waiting: those that wait for a place or were preempted. tenant_tokens: tenant ->
    (prompt tokens, new tokens) of the requests that have begun. rows_by_path: how many rows have run in each of the forward's ways
    (`forward.batch.Way`). adapters_running, adapters_waiting: names of those that requests of either kind use, each once.
    """

    running: int
    waiting: int
    loading: int
    draining: bool
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    adapters_resident: int
    adapter_leases: int
    adapter_bytes: int
    adapter_budget_bytes: int
    loads: int
    load_failures: int
    evictions: int
    load_seconds: float
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    step_errors: int
    tenant_tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows_by_path: dict[str, int] = field(default_factory=dict)
    adapters_running: tuple[str, ...] = ()
    adapters_waiting: tuple[str, ...] = ()


class TokenCounts:
    """Tokens by tenant, for a bounded number of tenants."""

    def __init__(self) -> None:
        self.by_tenant: dict[str, tuple[int, int]] = {}
        self.prompt = self.generation = 0

    def add(self, tenant: str, prompt: int, generation: int) -> None:
        self.prompt, self.generation = self.prompt + prompt, self.generation + generation
        if tenant not in self.by_tenant and len(self.by_tenant) >= MAX_TENANTS:
            tenant = OTHER
        before = self.by_tenant.get(tenant, (0, 0))
        self.by_tenant[tenant] = (before[0] + prompt, before[1] + generation)
