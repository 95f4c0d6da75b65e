"""A version of an adapter in a store, as it is listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.store.manifest import FACTS, PARAMETERS, Descriptor


@dataclass(frozen=True)
class Version:
    """name: "acme/support". digest: of its manifest, which decides every byte of its files. created: when its files were written, in ISO
    form, "" where they do not say. files: name -> blob. annotations: the manifest's; what they say of the files was checked with them."""

    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    created: str
    files: Mapping[str, Descriptor]
    annotations: Mapping[str, str]

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(blob.size for blob in self.files.values())

    @property
    def method(self) -> str:
        """The method's name, as in a run file."""
        return self.annotations.get(FACTS["method"], "")

    @property
    def base(self) -> str:
        """The name of the base that it was trained on, "" where its files do not say."""
        return self.annotations.get(FACTS["base"], "")

    @property
    def fingerprint(self) -> str:
        """The base's fingerprint, "" for a peft folder without trimtab.json."""
        return self.annotations.get(FACTS["fingerprint"], "")

    @property
    def parameters(self) -> int | None:
        """How many numbers its tensors hold; None if the manifest, another tool's, does not say."""
        found = self.annotations.get(PARAMETERS, "")
        return int(found) if found.isdigit() else None
