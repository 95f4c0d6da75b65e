"""Devices that a plan can be made for: sizes and speeds from their vendors' data sheets, and this machine's CPU, which is measured.

Peaks are dense: data sheets print bf16 with sparsity too, which is twice as much. A link's bandwidth is one direction's, half of what data
sheets print. GB and TB are 10⁹ and 10¹² bytes.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass

import torch

from trimtab.bases.spec import Spec
from trimtab.cost.estimate import EFFICIENCY, probe_flops
from trimtab.errors import ConfigError, nearest
from trimtab.memory import machine_memory
from trimtab.tables import counted


@dataclass(frozen=True)
class Device:
    """One device, or one rank's part of a machine. flops: FLOP/s of dense bf16 matrix products. read_bytes: bytes a second from its memory.
    link_bytes: bytes a second to another device, in one direction. source: where these figures come from. kind: the torch device. shares:
    (least, most) of `flops` that a training step is assumed to reach, with `reached` saying where that comes from."""

    name: str
    memory_bytes: float
    flops: float
    read_bytes: float
    link_bytes: float
    link: str
    source: str
    kind: str = "cuda"
    shares: tuple[float, float] = (0.2, 0.45)
    reached: str = "assumed, not measured by us on a GPU"

    @property
    def torch(self) -> torch.device:
        return torch.device(self.kind)


def _gpu(name: str, gb: float, teraflops: float, gb_s: float, link_gb_s: float, link: str, source: str) -> Device:
    """link_gb_s: both directions together, as data sheets print it."""
    return Device(name, gb * 1e9, teraflops * 1e12, gb_s * 1e9, link_gb_s * 1e9 / 2, link, source)


DEVICES = (
    _gpu("a10-24gb", 24, 125, 600, 64, "PCIe 4", "NVIDIA A10 data sheet"),
    _gpu("a100-40gb", 40, 312, 1555, 600, "NVLink", "NVIDIA A100 data sheet, SXM"),
    _gpu("a100-80gb", 80, 312, 2039, 600, "NVLink", "NVIDIA A100 data sheet, SXM"),
    _gpu("b200-180gb", 180, 2250, 8000, 1800, "NVLink", "NVIDIA DGX B200 data sheet, an eighth of it"),
    _gpu("h100-80gb", 80, 989, 3350, 900, "NVLink", "NVIDIA H100 data sheet, SXM"),
    _gpu("h100-pcie-80gb", 80, 756, 2000, 128, "PCIe 5", "NVIDIA H100 data sheet, PCIe, without an NVLink bridge"),
    _gpu("h200-141gb", 141, 989, 4800, 900, "NVLink", "NVIDIA H200 data sheet, SXM"),
    _gpu("l4-24gb", 24, 121, 300, 64, "PCIe 4", "NVIDIA L4 data sheet"),
    _gpu("l40s-48gb", 48, 362, 864, 64, "PCIe 4", "NVIDIA L40S data sheet"),
    _gpu("mi300x-192gb", 192, 1307, 5300, 128, "Infinity Fabric, one of seven links", "AMD Instinct MI300X data sheet"),
    _gpu("rtx-4090-24gb", 24, 165, 1008, 64, "PCIe 4", "NVIDIA Ada GPU architecture whitepaper, sums in fp32"),
    _gpu("rtx-a6000-48gb", 48, 155, 768, 64, "PCIe 4", "NVIDIA RTX A6000 data sheet, without an NVLink bridge"),
)
BY_NAME = {d.name: d for d in DEVICES}
CPU = "cpu"
"""This machine, measured when it is asked for."""


def find_device(name: str, spec: Spec, dtype: torch.dtype, ranks: int = 1) -> Device:
    """The device of a name; `cpu` is measured on a base's shape and dtype, as a part for each of so many ranks. ConfigError if there is no
    such device."""
    if name == CPU:
        return measured_cpu(spec, dtype, ranks)
    if name not in BY_NAME:
        known = (*BY_NAME, CPU)
        raise ConfigError(f"--device {name}: there is no such device{nearest(name, known)}", fix=f"use one of {', '.join(known)}")
    return BY_NAME[name]


def measured_cpu(spec: Spec, dtype: torch.dtype, ranks: int = 1) -> Device:
    """This machine's CPU with torch's threads: memory as the system says, the speed of an MLP forward and backward, of reading memory, and
    of a local socket, over which ranks of one machine talk. Takes about a second. Ranks share memory and cores."""
    total, _ = machine_memory()
    flops, read, link = probe_flops(spec, dtype, torch.device("cpu")), read_speed(), socket_speed()
    source = f"measured here with {counted(torch.get_num_threads(), 'thread')}, beside what else runs"
    if ranks > 1:  # they run at the same time, and what was measured is all that the machine has
        source += f"; one of {ranks} ranks has 1/{ranks} of its memory and speed"
    reached = "measured on the bundled base: 0.4 of an MLP's"
    return Device(CPU, total / ranks, flops / ranks, read / ranks, link, "a local socket", source, "cpu", EFFICIENCY, reached)


def read_speed(seconds: float = 0.2, size: int = 2**28) -> float:
    """Bytes a second that a sum over `size` bytes reads: the best of several, as other programs can only make it slower."""
    block = torch.zeros(size // 4, dtype=torch.float32)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return size / best


def socket_speed(size: int = 2**26) -> float:
    """Bytes a second through a local socket, from one thread to another."""
    here, there = socket.socketpair()
    with here, there:
        sender = threading.Thread(target=here.sendall, args=(bytes(size),))
        began, left = time.perf_counter(), size
        sender.start()
        while left:
            left -= len(there.recv(min(left, 2**20)))
        took = time.perf_counter() - began
        sender.join()
    return size / took
