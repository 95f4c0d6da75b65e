"""`trimtab chat`"""

from __future__ import annotations

from typing import Any

import click

from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, on_base, sampling_options, store_option
from trimtab.cli.terminal import say
from trimtab.decode.text import Decoder, TextStream


@click.command()
@base_option
@click.option("--adapter", help="An adapter's folder, or its name in the store; the base itself where none is given.")
@store_option
@click.option("--system", help="A system message before the conversation.")
@sampling_options
@dtype_option
@device_option
@on_base
def chat(on: OnBase, adapter: str | None, system: str | None, sampling: dict[str, Any]) -> None:
    """Talk to the base or to an adapter. An empty line or end of input leaves; /reset begins anew.

    \b
    Example:
      trimtab chat --adapter examples/runs/desks/adapters/support-lora
    """
    from trimtab.decode.generate import Sampling

    with on.before_loading([adapter] if adapter else []):
        pass  # nothing else is asked for
    base = on.open()
    decoder = Decoder(base.tokenizer)
    speaker = on.adapter(adapter, base) if adapter is not None else None
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while text := _ask():
        if text == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        ids = base.encode_messages(messages)
        shown = _Stream(decoder.stream())
        new = base.generate_ids([ids], [speaker], Sampling(**sampling), shown)[0]
        shown.end()
        messages.append({"role": "assistant", "content": base.tokenizer.decode(new, skip_special_tokens=True)})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


class _Stream:
    """Prints an answer as its tokens appear. A line break of two characters waits until it is whole, and is printed as one."""

    def __init__(self, text: TextStream):
        self.text, self.held = text, ""

    def __call__(self, _: int, token: int) -> None:
        shown = self._unbroken(self.text.push(token))
        self.held = "\r" if shown.endswith("\r") else ""
        say(shown.removesuffix("\r"), nl=False)

    def end(self) -> None:
        """What is left, and a line break."""
        say(self._unbroken(self.text.finish()))

    def _unbroken(self, fresh: str) -> str:
        return (self.held + fresh).replace("\r\n", "\n")
