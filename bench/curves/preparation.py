"""The rows of `rows`, as training prepares them."""

from __future__ import annotations

from curves.curve import Curve
from curves.rows import COLUMNS, POINTS, limit, mapped, prepared

CURVE = Curve(
    what="reading and tokenising rows of two turns and 55 words for training, the bundled base's tokenizer",
    grows="rows",
    points=POINTS,
    columns=COLUMNS,
    ours=prepared,
    peers={"datasets.map": mapped},
    limit=limit,
    timeout_s=3600,
)
