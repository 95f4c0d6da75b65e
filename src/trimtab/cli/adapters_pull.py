"""`trimtab adapters pull`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli.options import json_option, store_option
from trimtab.cli.terminal import say
from trimtab.cli.transfer import megabytes, showing


@click.command()
@click.argument("url")
@click.argument("name")
@click.option("--alias", "aliases", multiple=True, help="Also give the version this alias; may be given several times.")
@click.option("--timeout", default=3600.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds for all of it.")
@store_option
@json_option("Print the report as JSON, and no progress.")
def pull(url: str, name: str, aliases: tuple[str, ...], timeout: float, root: Path | None, as_json: bool) -> None:
    """Fetch the adapter at URL into the store, as the next version of NAME.

    \b
    Examples:
      trimtab adapters pull oci://registry.example.com/acme/support:3 acme/support
      trimtab adapters pull s3://bucket/adapters#acme/support@3 acme/support --alias prod
      trimtab adapters pull hf://acme/support-lora@main acme/support

    Without a tag a registry's `latest` is meant, and of a folder (s3://, file:///, …) the newest version of NAME. Every file is compared
    with its digest, and nothing is to be seen in the store before all of it has arrived and passed the store's checks. A pull that was
    interrupted, or that --timeout has ended, goes on where it stopped. A peft folder of the hub without trimtab.json names no base: it is
    kept as unverified.
    """
    from trimtab.store.registry import Store
    from trimtab.store.remotes import pull

    with showing(quiet=as_json) as begin:
        report = pull(Store(root, create=True), url, name, aliases=aliases, begin=begin, timeout_s=timeout)
    version = report.version
    if as_json:
        found = {"ref": version.ref, "digest": version.digest, "aliases": version.aliases, "verified": bool(version.fingerprint)}
        found |= {"url": report.url, "there": report.there}
        click.echo(json.dumps(found | {"bytes_moved": report.moved, "bytes_skipped": report.skipped}))
        return
    say(f"{version.ref} ({', '.join(version.aliases)}) holds what is at {report.url}")
    if not version.fingerprint:
        say("unverified: its files do not say which base they were made for; names and shapes are checked when it is loaded")
    say(f"{megabytes(report.moved)} fetched, {megabytes(report.skipped)} were here already")
