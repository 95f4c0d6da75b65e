"""What an engine is told: how much memory it may use, how much it runs at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab import ops
from trimtab.bases.fits import available_bytes, most_bytes
from trimtab.errors import ConfigError
from trimtab.memory import OutOfMemory
from trimtab.model import Base

KV_SHARE, ADAPTER_SHARE = 0.3, 0.1
"""Shares of the free memory that are taken where none is named: a base's activations and the rest of the machine need room too."""
TYPICAL_TOKENS = 1024
"""On a CPU, whose memory others use as well, blocks for max_running sequences of this length are enough where no size is named."""


@dataclass(frozen=True)
class EngineConfig:
    """kv_bytes: memory of the KV blocks; adapter_bytes: of packed adapters. None: a share of what is free. block_size: tokens of a block;
    None: as many as the device's attention wants (`fitted`). max_running: sequences that hold KV blocks at once. max_step_rows: token rows
    of one step, decodes first. max_queued: requests that wait at most; more are refused. prefix_cache: keep blocks of ended sequences for
    prompts that begin alike. share_prefix_across_tenants: let tenants find each other's blocks of the same adapter (who waits less learns
    what others have asked). speculate: draft tokens that a sequence has had before, and verify several in a step, where that pays.
    """

    kv_bytes: int | None = None
    adapter_bytes: int | None = None
    block_size: int | None = None
    max_running: int = 64
    max_step_rows: int = 1024
    max_queued: int = 1024
    prefix_cache: bool = True
    share_prefix_across_tenants: bool = False
    speculate: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)}: must be at least 1"
            for name in ("kv_bytes", "adapter_bytes", "block_size", "max_running", "max_step_rows", "max_queued")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.max_step_rows < self.max_running:
            problems.append(
                f"max_step_rows = {self.max_step_rows}: each of max_running = {self.max_running} sequences needs a row to decode"
            )
        if problems:
            raise ConfigError("cannot serve like this", problems=problems)

    @property
    def block(self) -> int:
        """Tokens of a block, once it is known (`fitted`)."""
        assert self.block_size is not None
        return self.block_size


def fitted(config: EngineConfig, base: Base) -> EngineConfig:
    """The same with the size of blocks that the base's attention reads on its device, where none is named."""
    if config.block_size is not None:
        return config
    s = base.spec
    first = s.layers[0]
    return replace(config, block_size=ops.page_size(base.device, base.dtype, first.head_dim, first.num_heads // first.num_kv_heads))


@dataclass(frozen=True)
class Budgets:
    """What an engine's memory is divided into: KV blocks, and bytes of packed adapters."""

    kv_blocks: int
    adapter_bytes: int


def make_budgets(config: EngineConfig, base: Base, block_bytes: int) -> Budgets:
    """Divide the memory that is free once the weights are in the layout that decoding reads, which is made here: what a size is not named
    for gets its share. There are never more KV blocks than max_running sequences of full length can fill. ConfigError if not even one
    block fits; OutOfMemory, with what would fit, where the named sizes are more than can be had."""
    _ = base.attached.decode_path
    free = available_bytes(base.device)
    longest = -(-base.spec.max_positions // config.block)
    most = config.max_running * longest
    if config.kv_bytes is None and base.device.type == "cpu":
        most = min(most, max(longest, config.max_running * -(-TYPICAL_TOKENS // config.block)))
    budget = config.kv_bytes if config.kv_bytes is not None else int(KV_SHARE * free)
    blocks = min(most, budget // block_bytes)
    if blocks < 1:
        raise ConfigError(
            f"kv_bytes = {budget}: one block of {config.block} tokens takes {block_bytes} bytes",
            fix="give more memory to the KV cache",
        )
    adapters = config.adapter_bytes if config.adapter_bytes is not None else int(ADAPTER_SHARE * free)
    _refuse_too_much(config, base, blocks, block_bytes, adapters)
    return Budgets(blocks, adapters)


def _refuse_too_much(config: EngineConfig, base: Base, blocks: int, block_bytes: int, adapters: int) -> None:
    free = most_bytes(base.device)
    if blocks * block_bytes + adapters <= free:
        return
    fits = max(0, free - min(adapters, free // 4)) // block_bytes * config.block
    raise OutOfMemory(
        f"serving needs {blocks * block_bytes / 1e9:.3g} GB for keys and values and {adapters / 1e9:.3g} GB for adapters beside the base, "
        f"and {free / 1e9:.3g} GB are free on {base.device}",
        fix=f"keys and values of {fits:,} tokens fit, which is {fits // base.spec.max_positions} sequences of full length: give a smaller "
        "kv_bytes (--kv-gb) or adapter_bytes (--adapters-gb), serve fewer sequences at once, or make memory free.",
    )
