"""Damage to adapter folders, drawn from a seeded generator. Here: what may befall any file, and JSON; `mutate_files` has the rest.

A mutation takes a folder's files (name -> bytes, or a way to make something that is no regular file) and changes them in place. It says
what must come of it where that is certain whatever it was applied to: REFUSED, or SAME (loads, and computes what it did before).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

REFUSED, SAME, EITHER = "refused", "same", "either"
CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
Files = dict[str, bytes | Callable[[Path], None]]
Mutation = Callable[[Random, Files, Mapping[str, Files]], str]
MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def write(files: Files, folder: Path) -> None:
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)


def pick(rng: Random, files: Files, *names: str) -> str:
    """A file that is there and is bytes."""
    return rng.choice([n for n in names or tuple(files) if isinstance(files.get(n), bytes)])


def _json(files: Files, name: str) -> Any:
    data = files[name]
    assert isinstance(data, bytes)
    return json.loads(data)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, values: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


# ---- bytes ----


@mutation
def flip_bytes(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = pick(rng, files)
    raw = bytearray(files[name])
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    files[name] = bytes(raw)
    return EITHER


@mutation
def flip_in_the_header(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    raw = bytearray(files[WEIGHTS])
    raw[rng.randrange(8 + struct.unpack("<Q", raw[:8])[0])] = rng.randrange(256)
    files[WEIGHTS] = bytes(raw)
    return EITHER


@mutation
def truncate(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = pick(rng, files)
    files[name] = files[name][: rng.randrange(len(files[name]))]
    return REFUSED if name == WEIGHTS else EITHER  # a JSON file may lose its newline


@mutation
def append(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = pick(rng, files)
    files[name] += rng.choice([b"\0", b" ", b"{}", b"\n", rng.randbytes(40)])
    return REFUSED if name == WEIGHTS else EITHER


@mutation
def splice(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = pick(rng, files)
    raw, at, to = files[name], rng.randrange(len(files[name])), rng.randrange(len(files[name]))
    chunk = raw[to : to + rng.randint(1, 64)]
    files[name] = raw[:at] + chunk + raw[at + (len(chunk) if rng.random() < 0.5 else 0) :]
    return EITHER


@mutation
def empty(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    files[pick(rng, files)] = b""
    return REFUSED


# ---- JSON ----

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 4.0),
    *("", "4", "LORA", "no", "true", "all-linear", ".*", "(a*)*", "../../etc/passwd", "q_proj", "x" * 5000, "\0"),
    *("gelu", "parallel", "sha256:0", "__import__('os')", "none", "CAUSAL_LM"),
    *([], [1], ["q_proj", "v_proj"], ["q_porj"], [[]], [0], [1, 0], [2**47, 2**47], ["down_proj"], [None] * 5000),
    *({}, {"a": 1}, {"q_proj": 2}, {"q_proj": 1e9}),
]


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in inner for p in _paths(v, (*at, k)))]


def _parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


@mutation
def edit_json(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """One value, anywhere in a JSON file or in the weights' header, becomes another, or goes, or moves to another key."""
    name = pick(rng, files)
    content, values = split(files[name]) if name == WEIGHTS else (_json(files, name), b"")
    path = rng.choice([p for p in _paths(content) if p])
    parent = _parent(content, path)
    how = rng.random()
    if how < 0.7:
        parent[path[-1]] = rng.choice(VALUES)
    elif how < 0.85 or isinstance(parent, list):
        del parent[path[-1]]
    else:
        parent[rng.choice(["a", "", "r", str(path[-1]) + "x", "__proto__", "x" * 600])] = parent.pop(path[-1])
    files[name] = join(content, values) if name == WEIGHTS else json.dumps(content).encode()
    return EITHER


FIELDS: dict[str, list[Any]] = {
    "r": [1, 2, 4, 8, 8.0, "4", True],
    "lora_alpha": [1, 8, 16.0, "8", True, 0, -3],
    "use_rslora": [True, False, 1, 0, "no", "yes"],
    "use_dora": [True, False, "no"],
    "target_modules": ["all-linear", ["q_proj"], ["q_proj", "v_proj"], ".*q_proj"],
    "rank_pattern": [{}, {"mlp.*": 6}],
    "alpha_pattern": [{}, {"mlp.*": 9}, {"q_proj": "3"}, {"q_proj": True}],
    "feedforward_modules": [[], ["down_proj"], None],
    "num_virtual_tokens": [3, 4, 5, "3", 3.0],
    "variant": ["houlsby", "pfeiffer", "parallel"],
    "non_linearity": ["relu", "gelu", "silu", "tanh"],
    "scaling": [1, 2.5, 4.0, "4", True],
    "reduction_factor": [4, 8, 16, "8"],
    "layers_to_transform": [None, [0], [1], [0, 1], 1],
    "lora_dropout": [0, 0.5],
    "dropout": [0, 0.5],
    "modules_to_save": [None, [], ["lm_head"]],
    "exclude_modules": [None, ["q_proj"]],
    "bias": ["none", "all"],
}


@mutation
def change_a_field(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """A hyperparameter becomes one that may well fit, in the config, in the note, or in both."""
    contents = {n: _json(files, n) for n in (CONFIG, NOTE) if n in files}
    places = {n: c.get("fields", {}) if n == NOTE else c for n, c in contents.items()}
    key = rng.choice([k for k in places[CONFIG] if k in FIELDS])
    value = rng.choice(FIELDS[key])
    for name in rng.choice([[CONFIG], [NOTE], [CONFIG, NOTE]]):
        if name in places:
            places[name][key] = value
            files[name] = json.dumps(contents[name]).encode()
    return EITHER


@mutation
def add_an_option(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """One that trimtab does not know: off, it changes nothing; on, it might, so it is refused."""
    on = rng.random() < 0.5
    value = rng.choice([1, "on", [0], {"a": 1}, True] if on else [None, False, [], {}, ""])
    files[CONFIG] = json.dumps(_json(files, CONFIG) | {"some_future_option": value}).encode()
    return REFUSED if on else SAME


@mutation
def duplicate_a_key(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = pick(rng, files)
    content, values = split(files[name]) if name == WEIGHTS else (_json(files, name), b"")
    key = rng.choice(list(content))
    text = json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice([content[key], *VALUES[:20]]))}}}"
    files[name] = join(text.encode(), values) if name == WEIGHTS else text.encode()
    return REFUSED


@mutation
def nest_deeply(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """Deep enough for a parser that recurses; a note's run settings may hold what they like, as long as it can be read at all."""
    name, depth = pick(rng, files, CONFIG, NOTE), rng.choice([50, 900, 5000, 200_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    text = json.dumps(_json(files, name))[:-1]
    files[name] = f'{text}, "deep": {opening * depth}1{closing * depth}}}'.encode()
    return REFUSED if name == CONFIG or depth > 2000 else SAME


@mutation
def not_quite_json(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = pick(rng, files, CONFIG, NOTE)
    text = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "'a'", "// x\n1", "0x10", "9" * 5000])
    files[name] = (json.dumps(_json(files, name))[:-1] + f', "init_lora_weights": {text}}}').encode()
    # a number too large for a float is Infinity in Python; where it is nothing that is read, it stays out of what an adapter computes
    return EITHER if text == "1e999" else REFUSED


@mutation
def rewrite_json(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """The same content: other blanks, other order."""
    name = pick(rng, files, *[n for n in files if n != WEIGHTS])
    content = list(_json(files, name).items())
    rng.shuffle(content)
    files[name] = json.dumps(dict(content), indent=rng.choice([None, 0, 4]), ensure_ascii=rng.random() < 0.5).encode()
    return SAME


@mutation
def change_what_was_recorded(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """What the note says of how it was trained is nobody's to verify and changes nothing."""
    if NOTE not in files:
        return rewrite_json(rng, files, others)
    note = _json(files, NOTE)
    note["run"] = rng.choice([{}, None, [1], {"metrics": {"loss": 1e300}}, "x"])
    note["created"] = rng.choice(VALUES)
    files[NOTE] = json.dumps(note).encode()
    return SAME


@mutation
def change_a_digest(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    if NOTE not in files:
        return duplicate_a_key(rng, files, others)
    note = _json(files, NOTE)
    wrong = "sha256:" + "".join(rng.choice("0123456789abcdef") for _ in range(64))
    keys = [("files", CONFIG), ("files", WEIGHTS), ("base", "fingerprint"), ("tokenizer",), ("chat_template",)]
    path = rng.choice(keys)
    _parent(note, path)[path[-1]] = wrong
    files[NOTE] = json.dumps(note).encode()
    return EITHER if path[0] == "files" else REFUSED  # a restamp makes the former right again
