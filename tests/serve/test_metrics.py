"""What Prometheus reads: vLLM's names, true values, bounded labels."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.store.common import stirred, tiny_base
from trimtab.errors import LimitError, TrimtabError
from trimtab.methods import METHODS
from trimtab.serve.admission import Admission
from trimtab.serve.audit import Audit
from trimtab.serve.engine import Engine
from trimtab.serve.live import snapshot
from trimtab.serve.metrics import MAX_TENANTS, OTHER, PREFIX, REASONS, Metrics
from trimtab.serve.request import Request, SamplingParams, Usage
from trimtab.serve.stats import EngineStats, StepFacts
from trimtab.serve.tenant import Tenant

STATS = EngineStats(
    running=3,
    waiting=2,
    loading=1,
    draining=False,
    kv_blocks_total=200,
    kv_blocks_used=50,
    kv_blocks_cached=20,
    adapters_resident=7,
    adapter_leases=3,
    adapter_bytes=12345,
    adapter_budget_bytes=99999,
    loads=11,
    load_failures=1,
    evictions=4,
    load_seconds=2.5,
    preemptions=6,
    drafted_tokens=40,
    accepted_tokens=30,
    prefix_query_tokens=1000,
    prefix_hit_tokens=400,
    prompt_tokens=5000,
    generation_tokens=600,
    steps=70,
    step_errors=0,
    tenant_tokens={"acme": (10, 1), "law": (20, 2)},
    rows_by_path={"one_call": 900, "layer_by_layer": 80, "model": 7},
)
ASKED = Request("r", (1, 2), SamplingParams())


def read(metrics: Metrics) -> dict[str, float]:
    """name{label=value,…} without the model's -> value"""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "base"
            found[sample.name + "".join(f",{k}={v}" for k, v in sorted(labels.items()))] = sample.value
    return found


def test_current_values_are_the_engines_at_each_reading() -> None:
    now = [STATS]
    metrics = Metrics("base", lambda: now[0])
    found = read(metrics)
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 1000,
        "prefix_cache_hits_total": 400,
        "num_preemptions_total": 6,
        "prompt_tokens_total": 5000,
        "generation_tokens_total": 600,
        "adapter_loads_total": 11,
        "adapter_load_failures_total": 1,
        "adapter_load_seconds_total": 2.5,
        "adapter_evictions_total": 4,
        "adapters_resident": 7,
        "adapter_resident_bytes": 12345,
        "adapter_budget_bytes": 99999,
        "tenant_prompt_tokens_total,tenant=acme": 10,
        "tenant_generation_tokens_total,tenant=law": 2,
        "forward_rows_total,path=one_call": 900,
        "forward_rows_total,path=layer_by_layer": 80,
        "forward_rows_total,path=model": 7,
    }
    assert {k: found[PREFIX + k] for k in expected} == expected
    now[0] = replace(STATS, running=0, kv_blocks_used=0)
    assert read(metrics)[PREFIX + "num_requests_running"] == 0


def test_times_are_observed_as_requests_end() -> None:
    metrics = Metrics("base", lambda: STATS)
    metrics.finished(ASKED, Usage(10, 4), "stop", 0.5, 0.7, 1.6, [0.1, 0.3, 0.5])
    metrics.finished(ASKED, Usage(10, 0), "cancelled", 2.0, None, 2.0, [])
    metrics.stepped(StepFacts(0.1, 30, 3, 4))
    found = read(metrics)
    expected = {
        "time_to_first_token_seconds_count": 1,
        "time_to_first_token_seconds_sum": 0.7,
        "time_to_first_token_seconds_bucket,le=0.5": 0,
        "time_to_first_token_seconds_bucket,le=0.75": 1,
        "inter_token_latency_seconds_count": 3,
        "inter_token_latency_seconds_sum": 0.9,
        "request_time_per_output_token_seconds_sum": 0.3,
        "e2e_request_latency_seconds_count": 2,
        "e2e_request_latency_seconds_sum": 3.6,
        "request_queue_time_seconds_sum": 2.5,
        "request_prompt_tokens_sum": 10,
        "request_generation_tokens_sum": 4,
        "iteration_tokens_sum": 33,
        "request_success_total,finished_reason=stop": 1,
        "request_success_total,finished_reason=abort": 1,
        "request_success_total,finished_reason=length": 0,
    }
    assert {k: found[PREFIX + k] for k in expected} == pytest.approx(expected)


def test_tenants_are_bounded_and_no_total_falls() -> None:
    tokens = {f"t{i}": (1, 2) for i in range(MAX_TENANTS - 1)}
    now = [replace(STATS, tenant_tokens=dict(tokens))]
    metrics = Metrics("base", lambda: now[0])
    before = read(metrics)
    now[0] = replace(STATS, tenant_tokens=tokens | {f"late{i}": (10, 20) for i in range(1000)})
    after = read(metrics)
    series = [k for k in after if k.startswith(PREFIX + "tenant_prompt_tokens_total")]
    assert len(series) == MAX_TENANTS + 1
    assert after[f"{PREFIX}tenant_prompt_tokens_total,tenant={OTHER}"] == 999 * 10
    assert sum(after[k] for k in series) == MAX_TENANTS - 1 + 1000 * 10
    assert all(after[k] >= before[k] for k in before if "tenant_" in k)


def test_hostile_label_values_stay_labels() -> None:
    metrics = Metrics("base", lambda: replace(STATS, tenant_tokens={'a"} 1\nfake 2': (1, 1)}))
    assert read(metrics)[f'{PREFIX}tenant_prompt_tokens_total,tenant=a"}} 1\nfake 2'] == 1


def test_a_reason_that_is_counted_for_the_first_time_while_they_are_read() -> None:
    """Requests are refused on the event loop while another thread writes the metrics out."""
    admission = Admission(max_open=1)
    metrics = Metrics("m", lambda: STATS, admission=admission)
    reading = [iter(counts.items()) for counts in (admission.rejects, metrics._rejects, metrics._finished)]
    for each in reading:
        next(each)
    admission.drain()
    with pytest.raises(TrimtabError):
        admission.admit(Tenant("a", "a"))
    metrics.rejected("auth")
    metrics.finished(None, Usage(1, 1, 0), "deadline", 0.1, None, 0.2, [])  # type: ignore[arg-type]
    for each in reading:
        list(each)
    assert admission.rejects["draining"] == 1


def test_rejects_by_reason_those_of_admission_included() -> None:
    admission = Admission(2)
    metrics = Metrics("base", lambda: STATS, admission=admission)
    admission.admit(Tenant("t", "t", max_concurrent=1))
    with pytest.raises(LimitError):
        admission.admit(Tenant("t", "t", max_concurrent=1))
    for reason in ("auth", "auth", "not_found", "made up by somebody", "and another"):
        metrics.rejected(reason)
    found = read(metrics)
    rejects = {k.partition("reason=")[2]: v for k, v in found.items() if "requests_rejected" in k}
    assert rejects == dict.fromkeys(REASONS, 0) | {"concurrency": 1, "auth": 2, "not_found": 1, OTHER: 2}
    assert found[PREFIX + "open_answers"] == 1


def test_a_failing_audit_log_shows(tmp_path) -> None:
    with Audit(tmp_path / "a.jsonl") as audit:
        metrics = Metrics("base", lambda: STATS, audit=audit)
        assert read(metrics)[PREFIX + "audit_failing"] == 0
        audit.problem, audit.lost = "No space left on device", 3
        assert read(metrics)[PREFIX + "audit_failing"] == 1 and read(metrics)[PREFIX + "audit_lost_lines_total"] == 3


def test_two_servers_in_one_process_do_not_mix() -> None:
    a, b = Metrics("base", lambda: STATS), Metrics("base", lambda: STATS)
    a.finished(ASKED, Usage(1, 1), "stop", 0.0, 0.1, 0.2, [])
    assert read(b)[PREFIX + "e2e_request_latency_seconds_count"] == 0


def test_a_real_engine_tells_what_it_did() -> None:
    base = tiny_base()
    adapter = stirred(base, METHODS["LORA"].examples()[0])
    served = snapshot("x", base, adapter.method, adapter.params)
    engine = Engine(base)
    metrics = Metrics("base", engine.stats)
    engine.on_finish, engine.on_step = metrics.finished, metrics.stepped
    try:
        sampling = SamplingParams(max_tokens=5, ignore_eos=True)
        engine.run([Request("a", (1, 2, 3), sampling, served, "acme"), Request("b", (4, 5), sampling, None, "law")])
        found = read(metrics)
    finally:
        engine.close()
    expected = {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "prompt_tokens_total": 5,
        "generation_tokens_total": 10,
        "adapter_loads_total": 1,
        "adapters_resident": 1,
        "request_success_total,finished_reason=length": 2,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 8,
        "request_generation_tokens_sum": 10,
        "tenant_prompt_tokens_total,tenant=acme": 3,
        "tenant_generation_tokens_total,tenant=law": 5,
    }
    assert {k: found[PREFIX + k] for k in expected} == expected
    rows = [found[f"{PREFIX}forward_rows_total,path={way}"] for way in ("one_call", "layer_by_layer", "model")]
    assert sum(rows) == found[PREFIX + "iteration_tokens_sum"] == 5 + 2 * 4


def families(metrics: Metrics) -> list:
    return list(text_string_to_metric_families(metrics.text().decode()))


def test_names_keep_to_what_promtool_checks():
    """promtool check metrics: https://github.com/prometheus/client_golang, prometheus/testutil/promlint."""
    abbreviated = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
    for family in families(Metrics("base", lambda: STATS)):
        assert family.documentation
        assert re.fullmatch(r"[a-z_][a-z0-9_]*", family.name), family.name
        name = {s.name for s in family.samples}
        if family.type == "counter":
            assert all(n.endswith(("_total", "_created")) for n in name), name
        else:
            assert not family.name.endswith("_total"), family.name
        if family.type == "gauge":
            assert not family.name.endswith(("_count", "_sum", "_bucket")), family.name
        words = set(family.name.split("_"))
        assert not words & abbreviated and not words & {"counter", "gauge", "histogram", "summary"}, family.name
        assert not words & {"milliseconds", "minutes", "hours", "kilobytes", "megabytes", "percent"}, family.name


def test_vllm_names_are_there_on_request():
    stats = replace(STATS, adapters_running=("acme/support@3", "law/x"), adapters_waiting=("law/x",))
    names = {f.name for f in families(Metrics("base", lambda: stats, vllm=True, max_running=64))}
    assert {
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:e2e_request_latency_seconds",
        "trimtab_adapters_resident",
    } <= names
    assert not {n.removeprefix("vllm:") for n in names if n.startswith("vllm:")} & {
        n.removeprefix("trimtab_") for n in names if n[:1] == "t"
    }
    found = [
        s for f in families(Metrics("base", lambda: stats, vllm=True, max_running=64)) for s in f.samples if "lora_requests_info" in s.name
    ]
    told = {"max_lora": "64", "running_lora_adapters": "acme/support@3,law/x", "waiting_lora_adapters": "law/x"}
    assert [s.labels for s in found] == [told] and found[0].value > 1.7e9
    assert any(s.name == "vllm:iteration_tokens_total_sum" for f in families(Metrics("base", lambda: stats, vllm=True)) for s in f.samples)
    assert "vllm:" not in Metrics("base", lambda: stats).text().decode()


def test_adapters_are_told_by_the_names_of_those_that_run():
    base = tiny_base()
    adapter = stirred(base, next(iter(METHODS.values())).examples()[0])
    engine = Engine(base)
    served = snapshot("acme/x", base, adapter.method, adapter.params)
    engine.submit(Request("a", (1, 2), SamplingParams(max_tokens=2), served), lambda delta: None)
    assert engine.stats().adapters_waiting == ("acme/x",) and engine.stats().adapters_running == ()
    while engine.requests:
        engine.step()
    assert engine.stats().adapters_waiting == ()
    engine.close()
