"""Options that several commands take, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from trimtab.cli.terminal import say
from trimtab.errors import AdapterError, ConfigError, Mistakes, printable

if TYPE_CHECKING:
    from trimtab.model import Base
    from trimtab.store import Adapter

Command: TypeAlias = Callable[..., Any]

MAX_BELOW = 8
"""So many adapters of a run folder are named where the folder was given for one of them."""

base_option = click.option(
    "--base", "base_name", default="smollm2-135m-instruct", show_default=True, help="Bundled name, folder, hub id or .gguf file."
)
_dtype = click.option("--dtype", help="float32, bfloat16 or float16; by default what the hardware multiplies natively.")
_quantize = click.option(
    "--quantize",
    help="Pack the base's linear layers while it is loaded: nf4, fp4, int8, nf4-double, fp4-double; gguf: keep a file's blocks.",
)
device_option = click.option("--device", help="cpu, cuda, cuda:1, …; by default CUDA where there is one.")
store_option = click.option(
    "--store",
    "root",
    type=click.Path(path_type=Path),
    help="The store's folder, instead of $TRIMTAB_STORE or ~/.local/share/trimtab/store.",
)


_differs = click.option("--base-differs", is_flag=True, help="Take adapters of another base too, as of this one in another precision.")


class Group(click.Group):
    """Lists its commands with the whole first sentence of each; click ends a sentence at the line's end with "..."."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in sorted(self.commands.items())])


class DatabasePlace(click.ParamType):
    """A tenants database: the path of a file, or the URL of a PostgreSQL database, which stays a text."""

    name = "file or url"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        from trimtab.serve.database import is_url

        return str(value) if is_url(value) else Path(value)


def dtype_option(command: Command) -> Command:
    """--dtype and --quantize: in which form the base's weights are in memory; --base-differs."""
    return _dtype(_quantize(_differs(command)))


def json_option(help: str) -> Callable[[Command], Command]:
    """--json, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def cluster_options(command: Command) -> Command:
    """--ray and --cpus, as `address` and `cpus`."""
    where = "Train on the nodes of this Ray cluster: HOST:PORT of its head, ray://HOST:PORT, auto, or local (this machine alone)."
    command = click.option("--cpus", type=click.IntRange(1), metavar="N", help="With --ray: cores of a group; by default a node's.")(
        command
    )
    return click.option("--ray", "address", metavar="ADDRESS", help=where)(command)


def set_option(example: str) -> Callable[[Command], Command]:
    """--set, as `changes`: what `RunConfig.load` and `Sweep.load` take. example: a change that such a file takes."""
    help_text = f"Use this value instead of the file's, such as {example}; may be given several times."
    return click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help=help_text)


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet, and say so."""
    from trimtab import atomic

    try:
        atomic.write_new(path, text)
    except FileExistsError:
        raise ConfigError(f"{path} exists", fix="name another file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", fix="name another file") from None
    say(f"written: {path}; look at it, then: trimtab check {path}")


def sampling_options(command: Command) -> Command:
    """--max-new-tokens, --temperature, --top-p, --top-k, --seed, as one argument `sampling`: the fields of `decode.generate.Sampling`."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")

    @wraps(command)
    def gathered(**options: Any) -> Any:
        return command(sampling={name: options.pop(name) for name in names}, **options)

    for option in (
        click.option("--seed", default=0, show_default=True, help="Of the random draws; of no effect at temperature 0."),
        click.option("--top-k", default=0, show_default=True, help="Draw from the k likeliest tokens; 0: from all."),
        click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest tokens that hold this much probability."),
        click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token each time."),
        click.option("--max-new-tokens", default=128, show_default=True, help="Length of the answer at most."),
    ):
        gathered = option(gathered)
    return gathered


@dataclass(frozen=True)
class OnBase:
    """The base that a command asks for, and the store in which it looks for adapters."""

    base_name: str
    dtype: str | None = None
    device: str | None = None
    root: Path | None = None
    quantize: str | None = None
    base_differs: bool = False

    @contextmanager
    def before_loading(self, adapters: Iterable[str]) -> Iterator[Mistakes]:
        """Before the base is loaded, which takes seconds: what can be told of base and adapters, and what the block notes besides, is
        refused at once."""
        from trimtab.bases import resolve_device, resolve_dtype
        from trimtab.bases.locate import refuse_hopeless
        from trimtab.bases.recipes import check_quantize

        mistakes = Mistakes()
        with mistakes.noted():
            resolve_dtype(self.dtype, resolve_device(self.device))
        with mistakes.noted():
            check_quantize(self.quantize, self.base_name)
        with mistakes.noted():
            refuse_hopeless(self.base_name)
        for name in dict.fromkeys(adapters):
            with mistakes.noted():
                _find_adapter(name, self.root)
        yield mistakes
        mistakes.refuse("this cannot be done")

    def as_stored(self) -> OnBase:
        """The same for a command that reads the base's weights and does not compute with them: in the dtype that they are stored in, mapped
        from their files, unless another one was asked for."""
        return replace(self, dtype=self.dtype or "auto", device=self.device or "cpu")

    def open(self) -> Base:
        """Load the base, with a line on standard error while it takes long."""
        from trimtab.model import load_base

        return load_base(self.base_name, dtype=self.dtype, device=self.device, quantize=self.quantize, base_differs=self.base_differs)

    def adapter(self, name: str, base: Base) -> Adapter:
        """Load an adapter from its folder, or by its name from the store."""
        from trimtab.store import Adapter

        return Adapter.load(name, base, store=self.root)


def on_base(command: Command) -> Command:
    """Gathers what --base, --dtype, --quantize, --base-differs, --device and --store say into one argument `on`, an `OnBase`."""

    @wraps(command)
    def gathered(
        base_name: str,
        dtype: str | None,
        quantize: str | None,
        base_differs: bool,
        device: str | None,
        root: Path | None = None,
        **options: Any,
    ) -> Any:
        return command(on=OnBase(base_name, dtype, device, root, quantize, base_differs), **options)

    return gathered


def base_options(command: Command) -> Command:
    """--base, --store, --dtype, --quantize, --device, as one argument `on`."""
    return base_option(store_option(dtype_option(device_option(on_base(command)))))


def _find_adapter(name: str, root: Path | None) -> None:
    """AdapterError if there is no such folder, nor such a name in the store; what it holds is for loading to judge."""
    from trimtab.store.find import find_adapter

    folder = find_adapter(name, root)
    if not isinstance(folder, Path):
        return
    if name == "base" and not folder.exists():
        raise AdapterError("'base' is the base itself, and an adapter is needed here", fix="name a folder, or an adapter of the store")
    if not folder.is_dir():
        raise AdapterError(f"adapter {name!r}: there is no such folder", fix=f"looked for {folder.absolute()}")
    refuse_folder_of_adapters(folder)
    if not (folder / "adapter_config.json").exists():
        raise AdapterError(f"adapter {name!r} has no adapter_config.json", fix="name an adapter's folder, or an adapter of the store")


def refuse_folder_of_adapters(folder: Path) -> None:
    """AdapterError where the folder is no adapter's but a run's, or that of a run's adapters: it names those adapters."""
    if (folder / "adapter_config.json").exists():
        return
    below = sorted(file.parent for pattern in ("*", "adapters/*") for file in folder.glob(f"{pattern}/adapter_config.json"))
    if below:
        shown = ", ".join(printable(str(f)) for f in below[:MAX_BELOW]) + (", …" if len(below) > MAX_BELOW else "")
        raise AdapterError(f"adapter {str(folder)!r}: this folder holds adapters and is none itself", fix=f"name one of them: {shown}")
