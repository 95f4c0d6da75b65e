"""`trimtab studio`"""

from __future__ import annotations

import json
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimtab.cli.options import json_option, store_option
from trimtab.cli.serve import check_packages
from trimtab.cli.terminal import say
from trimtab.errors import Mistakes

if TYPE_CHECKING:
    from trimtab.store.registry import Store


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), default=".")
@click.option(
    "--data",
    "data",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of rows that may be shown, beside RUNS; may be given several times.",
)
@click.option("--base", default="smollm2-135m-instruct", show_default=True, help="The base on which rows are read that no run has read.")
@store_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; elsewhere than here, the key is needed.")
@click.option("--port", default=8050, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@json_option("Print the line that says where the page is as JSON.")
def studio(runs: Path, data: tuple[Path, ...], base: str, root: Path | None, host: str, port: int, as_json: bool) -> None:
    """A page in the browser: the curves, scores and answers of all runs below the folder RUNS while they train, the rows that they train
    on, and the store's adapters.

    \b
    Example:
      trimtab studio examples/runs --data examples

    The page can begin runs, and stop, pause, resume and clone their variants, for whoever has the printed address with the key in it. Rows
    are shown from RUNS and the folders of --data alone. The page needs no network, and nobody but this machine can open it. With --host it
    listens elsewhere too; nothing is shown without the key then. Ctrl-C ends it, and not the runs that it has begun. `trimtab serve` has
    the same page at /, for what it serves.
    """
    check_packages()
    import uvicorn

    from trimtab.http import server
    from trimtab.http.studio import create_studio
    from trimtab.http.studio_auth import Shown
    from trimtab.train.follow import RunFolders

    mistakes = Mistakes()
    folders, store, new_store = None, None, None
    with mistakes.noted():
        folders = RunFolders(runs)
    with mistakes.noted():
        store, new_store = _store(root)
    mistakes.refuse("this cannot be shown")
    assert folders is not None
    with ExitStack() as open_parts:
        sock = open_parts.enter_context(server.bind(host, port))
        port = sock.getsockname()[1]
        local = host in server.LOOPBACK
        key = secrets.token_urlsafe(24)
        shown = Shown(
            folders, store, None if local else key, server.local_hosts(port) if local else None, data, base, key=key, new_store=new_store
        )
        open_parts.callback(shown.close)
        app = create_studio(shown)
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/#key={key}"
        if root is not None and new_store is not None and not as_json:
            say(f"there is no store in {root} yet: the first adapter that is published makes it")
        say(json.dumps({"url": where, "runs": str(folders.root)}) if as_json else f"showing the runs in {folders.root} at {where}")
        config = uvicorn.Config(
            app, http=server.Protocol, ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False
        )
        uvicorn.Server(config).run([sock])


def _store(root: Path | None) -> tuple[Store | None, Path | None]:
    """The store at `root`, or the default one; or where there is none yet, the folder of the one that the first adapter makes."""
    from trimtab.store.names import default_root
    from trimtab.store.registry import Store

    folder = default_root() if root is None else root
    if (folder / "index.json").is_file():
        return Store(root), None
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None, folder
    return (None if root is None else Store(root)), None  # which says what is wrong with it
