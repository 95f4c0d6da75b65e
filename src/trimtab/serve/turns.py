"""How many rows of a step each tenant gets where several want some, so that none waits long for the others' rows.

A step reads the base's weights once and computes its rows, so a tenant with one row waits for all that others have in the same step. Where
n tenants of equal weight compete, a step may take n times as long as each would need alone, and no longer. Rows beyond that wait for a
later step. A tenant that comes also waits for the step under way, so steps stay short for a while after another tenant was there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RECENT_S, LATELY_S = 1.0, 60.0
"""Seconds after its last request in which a tenant is likely to come again at once, and in which it may."""


@dataclass(frozen=True)
class Bounds:
    """read_rows: rows that count as long to compute as the weights take to be read. recent_rows, lately_rows: rows of a step if another
    tenant was there within RECENT_S, and within LATELY_S."""

    read_rows: int
    recent_rows: int
    lately_rows: int


ON_CPU = Bounds(4, 64, 256)
"""On two cores 13 rows take as long as the weights. The bound takes fewer, because a tenant that comes also waits for the step under way:
one row beside many of another tenant takes 1.4 times as long as alone. There a step with 64 rows takes 0.1 s, one with 256 takes 0.2 s, and
one with 1024 over 0.8 s. Prompts cost 17% more time in steps of 64 rows than in steps of 1024, and 7% more in steps of 256."""
ELSEWHERE = Bounds(256, 1024, 1024)
"""A GPU computes some hundred rows while it reads the weights, so steps are rarely cut. Taken from its data sheets; not measured."""


def row_limits(wanted: Mapping[str, int], weights: Mapping[str, float], read_rows: int, most: int) -> dict[str, int]:
    """Rows of the next step for each tenant, at least one; empty if all may have what they want.

    wanted: rows r_t that a tenant could use. A step of R rows takes read_rows + R, in rows' time. Tenant t with a share s_t of the weights
    allows R so large that read_rows + R <= (read_rows + r_t) / s_t. The smallest R of all, and `most` rows at most, is divided by weight;
    what one does not want is the others'.
    """
    total = sum(weights[t] for t in wanted)
    room = min([float(most), *((read_rows + rows) * total / weights[t] - read_rows for t, rows in wanted.items())])
    if sum(wanted.values()) <= room:
        return {}
    limits: dict[str, int] = {}
    for tenant in sorted(wanted, key=lambda t: (wanted[t] / weights[t], t)):
        limits[tenant] = max(1, min(wanted[tenant], int(room * weights[tenant] / total)))
        room -= limits[tenant]
        total -= weights[tenant]
    return limits
