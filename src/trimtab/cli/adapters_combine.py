"""`trimtab adapters combine`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli.options import OnBase, base_options, json_option
from trimtab.cli.terminal import say


@click.command("combine")
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True)
@click.option("--weight", "weights", type=float, multiple=True, help="One for each adapter, in their order; by default all 1.")
@click.option("--how", default="exact", show_default=True, help="exact, svd, ties, dare_linear or dare_ties.")
@click.option("--rank", type=int, help="Of the result, unless it is exact; by default the largest that there is.")
@click.option("--density", default=0.5, show_default=True, help="The share of a weight change's entries that TIES and DARE keep.")
@click.option("--seed", default=0, show_default=True, help="Of DARE's draws.")
@base_options
@json_option("Print the report as JSON, module by module.")
def combine(
    target: Path,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    how: str,
    rank: int | None,
    density: float,
    seed: int,
    on: OnBase,
    as_json: bool,
) -> None:
    """Write the weighted sum of ADAPTERS (folders, or names in the store), all of one method on one base, to TARGET as one adapter.

    \b
    Example:
      trimtab adapters combine both runs/a/adapters/support runs/a/adapters/legal --weight 0.5 --weight 0.5

    \b
    exact        LoRA: ranks add up; IA3 and bottleneck adapters too have exact sums
    svd          LoRA: the best approximation of that sum of a given rank
    ties         LoRA: TIES on the weight changes (arXiv:2306.01708), then the same
    dare_linear  LoRA: DARE on the weight changes (arXiv:2311.03099), then the same
    dare_ties    LoRA: DARE, then TIES' election of signs, then the same

    The error is that of the weight change, relative to the exact sum's.
    """
    from trimtab.store.combine import combine as add

    base = on.open()
    loaded = [on.adapter(name, base) for name in adapters]
    combined, report = add(loaded, weights or None, how=how, rank=rank, density=density, seed=seed)
    settings = {"how": how, "rank": rank} | ({"density": density, "seed": seed} if report.rank_error is not None else {})
    parts = [{"adapter": name, "weight": weight} for name, weight in zip(adapters, report.weights, strict=True)]
    combined.save(target, run={"combined": {"of": parts, **settings, "error": report.error, "rank_error": report.rank_error}})
    if as_json:
        click.echo(json.dumps(report.to_dict() | {"folder": str(target)}))
        return
    ranks = sorted(set(report.ranks.values()))
    shown = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    say(f"{target}: {combined.method.name}, {report.parameters:,} parameters{shown}")
    worst = max(report.errors, key=lambda name: report.errors[name])
    say(f"error against the exact sum: {report.error:.3g}; of one module at most {report.errors[worst]:.3g} ({worst})")
    if report.rank_error is not None:
        say(f"of what {how} left, bringing it back to that rank lost {report.rank_error:.3g}")
