"""Content is text: a message may spell out a control token, and it is encoded as the characters that it has.

`hidden` puts a name in the place of each control token's text in a content, so that no template sees it. After the rendering `shown` gives
the template's own control tokens new names, and the content its characters back. A copy of the tokenizer that knows the control tokens by
those names alone encodes the result: the ids of control tokens come from the template, and from nowhere else.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from trimtab.bases.tool_turns import BadRow


class PlainContent:
    """For one tokenizer. specials: matches the text of any control token; texts: those texts."""

    def __init__(self, tokenizer: Any, specials: re.Pattern[str], texts: Sequence[str]):
        self._tokenizer, self._specials, self._texts = tokenizer, specials, list(texts)
        nonce = secrets.token_hex(8)  # lower case and ASCII: no filter or normaliser changes it, and no client can guess it
        self._hidden = [f"q{nonce}h{i}q" for i in range(len(self._texts))]
        self._named = [f"q{nonce}n{i}q" for i in range(len(self._texts))]
        self._back = re.compile(f"q{nonce}h(\\d+)q")

    def hidden(self, content: str) -> str:
        """A content without control tokens' texts: what the template is to see."""
        return self._replaced(content, self._hidden)

    def hidden_in(self, value: Any) -> Any:
        """The same for all texts in a value of JSON."""
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, Mapping):
            return {self.hidden(k): self.hidden_in(v) for k, v in value.items()}
        return [self.hidden_in(v) for v in value] if isinstance(value, (list, tuple)) else value

    def shown(self, text: str) -> str:
        """A rendered text as `ids` takes it."""
        return self._back.sub(lambda found: self._texts[int(found[1])], self._replaced(text, self._named))

    def ids(self, text: str) -> list[int]:
        """The ids of a text that `shown` has given. BadRow if this tokenizer cannot be copied."""
        return list(self._encode(text))

    def _replaced(self, text: str, names: Sequence[str]) -> str:
        return self._specials.sub(lambda found: names[self._texts.index(found[0])], text)

    @cached_property
    def _encode(self) -> Callable[[str], Sequence[int]]:
        from tokenizers import Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BadRow("special token in the content: this tokenizer has no way to read it as text")
        copy = Tokenizer.from_str(_renamed(backend.to_str(), dict(zip(self._texts, self._named, strict=True))))
        return lambda text: copy.encode(text, add_special_tokens=False).ids


def _renamed(description: str, names: dict[str, str]) -> str:
    """A tokenizer's description (tokenizer.json) in which tokens have other names, and what it adds around a text is left out."""
    data = json.loads(description)
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:  # Unigram's, of (token, score)
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    data["added_tokens"] = [t | {"content": names.get(t["content"], t["content"])} for t in data["added_tokens"]]
    return json.dumps(data | {"post_processor": None, "truncation": None, "padding": None})
