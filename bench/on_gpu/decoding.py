"""Decoding through the engine: streams at once, with and without 64 adapters, and how busy the device is; vLLM beside it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from threading import Event
from typing import Any

from on_gpu.common import Setting, random_base, random_ids, random_model, run_points, tell, tokenizer


@dataclass(frozen=True)
class _Held:
    """An adapter that is in memory. Several with the same tensors are packed each for itself."""

    digest: str
    adapter: Any

    def load(self) -> Any:
        return self.adapter


def grid(setting: Setting) -> tuple[list[tuple[int, int]], int, int]:
    """((streams, adapters) of each point, tokens of a prompt, new tokens)."""
    streams, adapters, prompt, new = ((1, 4), (0, 2), 8, 4) if setting.tiny else ((1, 16, 64, 256), (0, 64), 128, 64)
    return [(s, a) for a in adapters for s in streams], prompt, new


def decoding(setting: Setting, size: str) -> None:
    from trimtab import LoraConfig
    from trimtab.serve.engine import Engine, EngineConfig
    from trimtab.store import Adapter

    base = random_base(setting, size)
    points, prompt, new = grid(setting)
    most = max(s for s, _ in points)
    sizes = {"kv_bytes": 64 << 20, "adapter_bytes": 64 << 20} if setting.tiny else {}
    engine = Engine(base, EngineConfig(max_running=most, max_step_rows=max(4 * most, 1024), **sizes))
    adapter = Adapter.create(base, LoraConfig(r=16, target_modules="all-linear"))
    for tensor in adapter.params.values():
        tensor += 0.01
    held = [_Held(f"sha256:{i}", adapter) for i in range(max(a for _, a in points))]
    prompts = [tuple(ids) for ids in random_ids(setting, size, most, prompt)]
    engine.start()
    try:
        works = {f"{s} streams, {a} adapters": partial(_streams, setting, engine, prompts[:s], held[:a], new) for s, a in points}
        run_points(setting, f"decoding {size}", works)
    finally:
        engine.close()


def _streams(setting: Setting, engine: Any, prompts: list[tuple[int, ...]], held: list[_Held], new: int) -> Mapping[str, float]:
    _answer(engine, prompts, held, 2)  # loads the adapters
    times = _answer(engine, prompts, held, new)
    began, last = min(t[0] for t in times), max(t[-1] for t in times)
    gaps = sorted(b - a for t in times for a, b in pairwise(t))
    figures = {"tokens_per_s": len(prompts) * (new - 1) / (last - began), "itl_ms": 1e3 * gaps[len(gaps) // 2]}
    return figures | {"busy": _busy(setting, lambda: _answer(engine, prompts, held, max(2, new // 4)))}


def _answer(engine: Any, prompts: list[tuple[int, ...]], held: list[_Held], new: int) -> list[list[float]]:
    """When the tokens of each stream came; all are submitted at once."""
    from trimtab.serve.request import Request, SamplingParams

    times: list[list[float]] = [[] for _ in prompts]
    ended, left = Event(), len(prompts)

    def sink(i: int, delta: Any) -> None:
        nonlocal left
        times[i] += [time.perf_counter()] * len(delta.tokens)
        if delta.finish is not None:
            left -= 1
            if delta.error is not None or not left:
                ended.set()

    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        salt = str(time.perf_counter())  # nothing is found in the prefix cache
        engine.submit(Request(f"{salt}-{i}", prompt, params, held[i % len(held)] if held else None, cache_salt=salt), partial(sink, i))
    if not ended.wait(120) or left:
        raise RuntimeError(f"{left} of {len(prompts)} streams have not ended")
    return times


def _busy(setting: Setting, work: Any) -> float:
    """The share of the time in which kernels run; on a CPU, in which a core computes."""
    import torch

    began = time.perf_counter()
    if not setting.on_gpu:
        cpu = time.process_time()
        work()
        return (time.process_time() - cpu) / (time.perf_counter() - began)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        began = time.perf_counter()
        work()
        setting.wait()
        took = time.perf_counter() - began
    return sum(e.self_device_time_total for e in profile.key_averages()) / 1e6 / took


def vllm(setting: Setting, size: str) -> None:
    if not find_spec("vllm"):
        tell(item=f"vllm {size}", skipped="vllm is not installed")
        return
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from trimtab import LoraConfig
    from trimtab.model import Base
    from trimtab.store import Adapter

    points, prompt, new = grid(setting)
    most, adapters = max(s for s, _ in points), max(a for _, a in points)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(setting, size)
        model.save_pretrained(f"{folder}/base")
        tokenizer().save_pretrained(f"{folder}/base")
        Adapter.create(Base(model, tokenizer()), LoraConfig(r=16, target_modules="all-linear")).save(f"{folder}/adapter")
        del model
        options = {"enable_lora": True, "max_loras": adapters, "max_lora_rank": 16, "max_num_seqs": most, "enable_prefix_caching": False}
        llm = LLM(f"{folder}/base", gpu_memory_utilization=0.8, max_model_len=4 * (prompt + new), **options)
        prompts = [{"prompt_token_ids": ids} for ids in random_ids(setting, size, most, prompt)]

        def streams(s: int, a: int) -> Mapping[str, float]:
            loras = [LoRARequest(f"a{i % a}", 1 + i % a, f"{folder}/adapter") for i in range(s)] if a else None
            took = []
            for tokens in (new, 1, new):  # the first loads the adapters
                began = time.perf_counter()
                llm.generate(
                    prompts[:s], SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), lora_request=loras, use_tqdm=False
                )
                took.append(time.perf_counter() - began)
            return {"tokens_per_s": s * (new - 1) / (took[2] - took[1])}

        run_points(setting, f"vllm {size}", {f"{s} streams, {a} adapters": partial(streams, s, a) for s, a in points})
