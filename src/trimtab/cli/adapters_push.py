"""`trimtab adapters push`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli.options import json_option, store_option
from trimtab.cli.terminal import say
from trimtab.cli.transfer import megabytes, showing


@click.command()
@click.argument("adapter")
@click.argument("url")
@store_option
@json_option("Print the report as JSON, and no progress.")
def push(adapter: str, url: str, root: Path | None, as_json: bool) -> None:
    """Send ADAPTER, a version in the store, to URL. Files that are there already are not sent again.

    \b
    Examples:
      trimtab adapters push acme/support@3 oci://registry.example.com/acme/support
      trimtab adapters push acme/support@3 s3://bucket/adapters
      trimtab adapters push acme/support@3 hf://acme/support-lora

    A registry's tags are the version's number and its aliases, or the tag in the URL. A folder (s3://, gs://, file:///, or anything else
    that fsspec knows) holds many adapters, each under its whole name, as an OCI image layout. On the Hugging Face hub the adapter is an
    ordinary peft folder, and a new repository is private. A number that is taken by other content is never overwritten.

    Credentials come from where the other tools keep them: `hf auth login` or HF_TOKEN, `docker login`, AWS_… or ~/.aws. Never in the URL.
    """
    from trimtab.store.registry import Store
    from trimtab.store.remotes import push

    with showing(quiet=as_json) as begin:
        report = push(Store(root), adapter, url, begin=begin)
    if as_json:
        found = {"ref": report.version.ref, "digest": report.version.digest, "url": report.url, "there": report.there}
        click.echo(json.dumps(found | {"bytes_moved": report.moved, "bytes_skipped": report.skipped}))
        return
    say(f"{report.version.ref} is at {report.url} as {', '.join(report.there)}")
    say(f"{megabytes(report.moved)} sent, {megabytes(report.skipped)} were there already")
