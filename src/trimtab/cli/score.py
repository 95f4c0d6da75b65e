"""`trimtab score`"""

from __future__ import annotations

import json
from typing import Any

import click

from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, json_option, on_base, store_option
from trimtab.cli.terminal import say
from trimtab.errors import ConfigError


@click.command()
@click.argument("texts", nargs=-1, required=True)
@base_option
@click.option("--adapter", "adapters", multiple=True, required=True, help="An adapter with a head: a folder, or a name in the store.")
@store_option
@click.option("--prompt", help="What the texts answer, for a reward; a problem whose steps they are, for a head of steps.")
@dtype_option
@device_option
@json_option("Print a JSON list of {text, adapter, scores, label}.")
@on_base
def score(texts: tuple[str, ...], on: OnBase, adapters: tuple[str, ...], prompt: str | None, as_json: bool) -> None:
    """Score TEXTS by the head of each --adapter: labels with their probabilities, or a reward.

    \b
    Example:
      trimtab score --adapter runs/intents/adapters/intents "Where is my card?"
      trimtab score --adapter runs/judge/adapters/judge --prompt "How do I cancel?" "Call us." "No idea."

    All run in one mixed batch.
    """
    with on.before_loading(adapters):
        pass  # nothing else is asked for
    base = on.open()
    loaded = {name: on.adapter(name, base) for name in adapters}
    if bare := [name for name, a in loaded.items() if a.head is None]:
        fix = "name an adapter of objective classify, reward or stepwise; `trimtab generate` asks others"
        raise ConfigError(f"{', '.join(bare)} has no head that could score texts", fix=fix)
    from trimtab.data.scored import read_ids

    asked, found = list[tuple[Any, str, list[int]]](), list[dict[str, Any]]()
    ids = list[list[int]]()
    for name, adapter in loaded.items():
        in_steps = adapter.head is not None and adapter.head.every_token
        rows = [(prompt or "", texts)] if in_steps else [(t, ()) for t in texts]
        for text, steps in rows:
            own = (
                read_ids(base.tokenizer, text, steps=steps) if in_steps or prompt is None else read_ids(base.tokenizer, text, prompt=prompt)
            )
            ids.append(own[0])
            asked.append((list(steps) or [text], name, own[1]))
    for (said, name, places), scores in zip(asked, base.scores(ids, [loaded[n] for _, n, _ in asked]), strict=True):
        head = loaded[name].head
        assert head is not None
        for text, values in zip(said, scores[places] if head.every_token else [scores], strict=True):
            found.append({"text": text, "adapter": name, **_told(head.labels, values)})
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for line in found:
        who = f"{line['adapter']}: " if len(loaded) > 1 else ""
        told = f"{line['label']} ({line['probability']:.3f})" if "label" in line else f"{line['scores'][0]:.4f}"
        say(f"{who}{told}\t{line['text']}")


def _told(labels: tuple[str, ...], values: Any) -> dict[str, Any]:
    """scores: as the head gives them, by label."""
    scores = values.tolist()
    if len(labels) == 1:
        return {"scores": scores}
    best = int(values.argmax())
    return {"label": labels[best], "probability": float(values.softmax(-1)[best]), "scores": dict(zip(labels, scores, strict=True))}
