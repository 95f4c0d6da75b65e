"""How many rows of a step each tenant gets where several want some, so that none waits long for the others' rows.

A step reads the base's weights once and computes its rows, so a tenant with one row waits for all that others have in the same step. Where
n tenants of equal weight compete, a step may take n times as long as each would need alone, and no longer. Rows beyond that wait for a
later step.
"""

from __future__ import annotations

from collections.abc import Mapping

READ_ROWS = 4
"""Rows that count as long to compute as the weights take to be read. On two cores these are 13. The bound takes fewer, because a tenant
that comes also waits for the step under way. So one row beside many of another tenant takes 1.4 times as long as alone."""
PROMPT_ROWS, RECENT_S = 64, 1.0
"""Rows of prompts in a step if several tenants were there within these seconds. A step with 1024 rows takes over a second on two cores, and
whoever comes meanwhile waits for its end."""


def row_limits(wanted: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Rows of the next step for each tenant, at least one; empty if all may have what they want.

    wanted: rows r_t that a tenant could use. A step of R rows takes READ_ROWS + R, in rows' time. Tenant t with a share s_t of the weights
    allows R so large that READ_ROWS + R <= (READ_ROWS + r_t) / s_t. The smallest R of all is divided by weight; what one does not want is
    the others'.
    """
    total = sum(weights[t] for t in wanted)
    room = min((READ_ROWS + rows) * total / weights[t] for t, rows in wanted.items()) - READ_ROWS if wanted else 0.0
    if len(wanted) < 2 or sum(wanted.values()) <= room:
        return {}
    limits: dict[str, int] = {}
    for tenant in sorted(wanted, key=lambda t: (wanted[t] / weights[t], t)):
        limits[tenant] = max(1, min(wanted[tenant], int(room * weights[tenant] / total)))
        room -= limits[tenant]
        total -= weights[tenant]
    return limits
