"""The OCI manifest of one version: which files it has, as descriptors of blobs, and a few facts for lists. JSON only, no disk.

    {"schemaVersion": 2, "mediaType": …manifest.v1+json, "artifactType": "application/vnd.trimtab.adapter.v1",
     "config": the empty descriptor, "layers": [a descriptor for each file, its name as org.opencontainers.image.title],
     "annotations": {method, base, its fingerprint, parameters, creation time}}

So `oras pull` and the like give a plain peft folder. Its bytes depend on the files alone: equal files have equal digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.store.card import CARD
from trimtab.store.files import MAX_JSON_BYTES, Refusal, digest_of, parse_json
from trimtab.store.folder import CONFIG, NOTE, WEIGHTS
from trimtab.store.names import DIGEST, short

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.trimtab.adapter.v1"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
FILE_TYPES = {
    CONFIG: "application/vnd.trimtab.adapter.config.v1+json",
    WEIGHTS: "application/vnd.trimtab.adapter.weights.v1+safetensors",
    NOTE: "application/vnd.trimtab.adapter.note.v1+json",
    CARD: "text/markdown",
}
"""The files that a version may have, in the order of its layers, and their media types."""
REQUIRED = (CONFIG, WEIGHTS)
SMALL_FILES = (CONFIG, NOTE, CARD)
"""Files of at most MAX_JSON_BYTES."""
TITLE = "org.opencontainers.image.title"
CREATED = "org.opencontainers.image.created"
FACTS = {"method": "io.trimtab.method", "base": "io.trimtab.base", "fingerprint": "io.trimtab.base.fingerprint"}
PARAMETERS = "io.trimtab.parameters"
MAX_FILE_BYTES = 2**40
MAX_ADAPTER_BYTES = 2**34
"""Of all files of one adapter: 16 GiB, more than a rank of 256 on every linear layer of a base of 70 billion parameters."""
MAX_ANNOTATIONS, MAX_ANNOTATION = 64, 4096


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a blob is: media type, "sha256:<hex>", bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return found | {"annotations": dict(self.annotations)} if self.annotations else found


@dataclass(frozen=True, slots=True)
class Manifest:
    """files: name -> descriptor of its blob, in the order of FILE_TYPES. annotations: as they stand in the manifest."""

    files: Mapping[str, Descriptor]
    annotations: Mapping[str, str]

    @property
    def blobs(self) -> list[Descriptor]:
        """Every blob that the manifest needs, the empty config included."""
        return [EMPTY_DESCRIPTOR, *self.files.values()]

    def to_bytes(self) -> bytes:
        layers = [self.files[name].to_json() for name in FILE_TYPES if name in self.files]
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": EMPTY_DESCRIPTOR.to_json(),
            "layers": layers,
            "annotations": dict(sorted(self.annotations.items())),
        }
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


EMPTY_DESCRIPTOR = Descriptor(EMPTY_TYPE, digest_of(EMPTY), len(EMPTY))


def file_descriptor(name: str, digest: str, size: int) -> Descriptor:
    """The layer of one of a version's files."""
    return Descriptor(FILE_TYPES[name], digest, size, {TITLE: name})


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Refusal, with a line for each finding, where it is not one of an adapter of ours: anything unknown in it is one."""
    if len(data) > MAX_JSON_BYTES:
        raise Refusal(f"{where} has {len(data):,} bytes; at most {MAX_JSON_BYTES:,} are read")
    document = parse_json(data, where)
    wanted = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE}
    problems = [f"{where}: {k} is {short(repr(document.get(k)))}, not {v!r}" for k, v in wanted.items() if not _is(document.get(k), v)]
    problems += [f"{where} has the unknown key {short(k)}" for k in document if k not in (*wanted, "config", "layers", "annotations")]
    config, layers, annotations = document.get("config"), document.get("layers"), document.get("annotations", {})
    if config != EMPTY_DESCRIPTOR.to_json():
        problems.append(f"{where}: its config is not the empty descriptor")
    if (reason := annotation_problem(annotations)) is not None:
        problems.append(f"{where}: {reason}")
    files: dict[str, Descriptor] = {}
    for layer in layers if isinstance(layers, list) else []:
        found = _layer(layer)
        if isinstance(found, str):
            problems.append(f"{where}: {found}")
        elif found.annotations[TITLE] in files:
            problems.append(f"{where} has the file {found.annotations[TITLE]} twice")
        else:
            files[found.annotations[TITLE]] = found
    problems += [f"{where} has no {name}" for name in REQUIRED if name not in files and not problems]
    if problems:
        raise Refusal("\n".join(problems[:20]))
    return Manifest({name: files[name] for name in FILE_TYPES if name in files}, annotations)


def _layer(value: Any) -> Descriptor | str:
    """The descriptor of a file, or what is wrong with it."""
    found = parse_descriptor(value)
    if isinstance(found, str):
        return f"a layer's {found}"
    title = found.annotations.get(TITLE, "")
    if title not in FILE_TYPES:
        return f"a layer is titled {short(repr(title))}; the files of an adapter are {', '.join(FILE_TYPES)}"
    if found.media_type != FILE_TYPES[title]:
        return f"{title} has the media type {short(repr(found.media_type))}, not {FILE_TYPES[title]!r}"
    if title in SMALL_FILES and found.size > MAX_JSON_BYTES:
        return f"{title} has {found.size:,} bytes; at most {MAX_JSON_BYTES:,} are read"
    return found


def parse_descriptor(value: Any) -> Descriptor | str:
    """A descriptor with exactly mediaType, digest, size and, maybe, annotations; or what is wrong with it."""
    if not isinstance(value, dict) or not {"mediaType", "digest", "size"} <= set(value) <= {"mediaType", "digest", "size", "annotations"}:
        return f"descriptor {short(repr(value))} does not have exactly mediaType, digest, size and annotations"
    kind, digest, size = value["mediaType"], value["digest"], value["size"]
    if not isinstance(kind, str) or not 0 < len(kind) <= 255:
        return f"media type {short(repr(kind))} is none"
    if not isinstance(digest, str) or DIGEST.fullmatch(digest) is None:
        return f"digest {short(repr(digest))} is not sha256: and 64 hexadecimal digits"
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        return f"size {short(repr(size))} is none"
    annotations = value.get("annotations", {})
    return annotation_problem(annotations) or Descriptor(kind, digest, size, annotations)


def annotation_problem(value: Any) -> str | None:
    """Why a value is no map of annotations. Ten thousand of them are looked at where an index is read."""
    if not isinstance(value, dict) or set(map(type, value.values())) - {str}:
        return "annotations are not a map of strings"
    texts = (*value, *value.values())
    if len(value) > MAX_ANNOTATIONS or max(map(len, texts), default=0) > MAX_ANNOTATION:
        return f"annotations are more than {MAX_ANNOTATIONS} or longer than {MAX_ANNOTATION:,} characters"
    return None if "".join(texts).isprintable() else "annotations hold control characters"


def _is(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and value == wanted
