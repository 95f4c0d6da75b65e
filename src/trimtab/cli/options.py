"""Options that several commands take, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trimtab.model import Base
    from trimtab.store import Adapter

base_option = click.option(
    "--base", "base_name", default="smollm2-135m-instruct", show_default=True, help="Bundled name, folder, hub id or .gguf file."
)
dtype_option = click.option("--dtype", help="float32, bfloat16 or float16; by default what the hardware multiplies natively.")
device_option = click.option("--device", help="cpu, cuda, cuda:1, …; by default CUDA where there is one.")


store_option = click.option(
    "--store",
    "root",
    type=click.Path(path_type=Path),
    help="The store's folder, instead of $TRIMTAB_STORE or ~/.local/share/trimtab/store.",
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--max-new-tokens, --temperature, --top-p, --top-k, --seed."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Of the random draws; of no effect at temperature 0."),
        click.option("--top-k", default=0, show_default=True, help="Draw from the k likeliest tokens; 0: from all."),
        click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest tokens that hold this much probability."),
        click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token each time."),
        click.option("--max-new-tokens", default=128, show_default=True, help="Length of the answer at most."),
    ):
        command = option(command)
    return command


def open_base(name: str, dtype: str | None, device: str | None) -> Base:
    """Load a base, with a line on standard error while it takes long."""
    from trimtab.model import load_base

    return load_base(name, dtype=dtype, device=device)


def open_adapter(name: str | None, base: Base, root: Path | None = None) -> Adapter | None:
    """Load an adapter from its folder, or by its name from the store at `root`; None stands for the base itself."""
    from trimtab.store import Adapter

    return None if name is None else Adapter.load(name, base, store=root)
