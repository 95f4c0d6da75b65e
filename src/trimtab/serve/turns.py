"""How many rows of a step each tenant gets where several want some, so that none waits long for the others' rows.

A step reads the base's weights once and computes its rows, so a tenant with one row waits for all that others have in the same step. Where
n tenants of equal weight compete, a step may take n times as long as each would need alone, and no longer. Rows beyond that wait for a
later step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RECENT_S = 1.0
"""A tenant counts as there for so long after its last request."""


@dataclass(frozen=True)
class Bounds:
    """read_rows: rows that count as long to compute as the weights take to be read. prompt_rows: rows of prompts in a step if several
    tenants were there lately."""

    read_rows: int
    prompt_rows: int


ON_CPU = Bounds(4, 64)
"""On two cores 13 rows take as long as the weights. The bound takes fewer, because a tenant that comes also waits for the step under way:
one row beside many of another tenant takes 1.4 times as long as alone. A step with 1024 rows takes over a second there."""
ELSEWHERE = Bounds(256, 1024)
"""A GPU computes some hundred rows while it reads the weights, so steps are rarely cut. Taken from its data sheets; not measured."""


def row_limits(wanted: Mapping[str, int], weights: Mapping[str, float], read_rows: int) -> dict[str, int]:
    """Rows of the next step for each tenant, at least one; empty if all may have what they want.

    wanted: rows r_t that a tenant could use. A step of R rows takes read_rows + R, in rows' time. Tenant t with a share s_t of the weights
    allows R so large that read_rows + R <= (read_rows + r_t) / s_t. The smallest R of all is divided by weight; what one does not want is
    the others'.
    """
    total = sum(weights[t] for t in wanted)
    room = min((read_rows + rows) * total / weights[t] for t, rows in wanted.items()) - read_rows if wanted else 0.0
    if len(wanted) < 2 or sum(wanted.values()) <= room:
        return {}
    limits: dict[str, int] = {}
    for tenant in sorted(wanted, key=lambda t: (wanted[t] / weights[t], t)):
        limits[tenant] = max(1, min(wanted[tenant], int(room * weights[tenant] / total)))
        room -= limits[tenant]
        total -= weights[tenant]
    return limits
