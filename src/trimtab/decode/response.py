"""Reads an answer as the tokenizer's own response template says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimtab.bases.call_grammar import Schemas
from trimtab.decode.pieces import Piece, joined


class ResponseReader:
    """The tokenizer's own response template, by transformers."""

    def __init__(self, template: Mapping[str, Any], tools: Schemas, prompt: str):
        from transformers.utils.chat_parsing import ResponseParser

        told = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in tools.items()]
        self._parser, self._tools, self._index = ResponseParser(dict(template), prefix=prompt, tools=told), tools, -1
        self._broken, self._raw, self._fresh = False, "", set[str]()

    def feed(self, text: str) -> list[Piece]:
        if self._broken:
            return [Piece("content", text)] if text else []
        self._raw += text
        try:
            return self._pieces(self._parser.feed(text))
        except Exception:  # whatever a template and an answer do to the parser: the text is there all the same
            return self._give_up()

    def finish(self, cut: bool) -> list[Piece]:
        if self._broken:
            return []
        try:
            return self._pieces(self._parser.finalize()[1])
        except Exception:
            return self._give_up()

    def _give_up(self) -> list[Piece]:
        """What has not been told yet is content, and so is all that follows."""
        self._broken = True
        return [Piece("content", self._raw)] if self._raw else []

    def _pieces(self, events: list[dict[str, Any]]) -> list[Piece]:
        out: list[Piece] = []
        for event in events:
            field = event["field"]
            if event["type"] == "region_open":
                self._fresh.add(field)
            elif event["type"] == "region_chunk" and not event["dirty"]:
                text = event["text"].lstrip() if field in self._fresh else event["text"]
                if text:
                    self._fresh.discard(field)
                    out.append(Piece("content" if field == "content" else "reasoning", text))
                self._raw = ""
            elif event["type"] == "region_close" and field == "tool_calls":
                out += self._calls(event["value"])
                self._raw = ""
        return joined(out)

    def _calls(self, value: Any) -> list[Piece]:
        out = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call)
            if function["name"] not in self._tools:
                raise ValueError("a tool that nobody gave")
            self._index += 1
            arguments = function.get("arguments", {})
            spelt = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            out += [Piece("call", function["name"], self._index), Piece("arguments", spelt, self._index)]
        return out
