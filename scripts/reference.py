"""The pages of the site that are made from the code, as Markdown: keys of a run file from its classes, the Python names, the HTTP API."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from textwrap import dedent
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import click
from pydantic import BaseModel

import trimtab
from trimtab.cli import main
from trimtab.data import Source
from trimtab.http.app import create_app
from trimtab.hyperparameters import Hyperparameters
from trimtab.methods import BY_NAME
from trimtab.objectives import OBJECTIVES
from trimtab.rewards.spec import Reward
from trimtab.train.halving import Halving
from trimtab.train.options import DataConfig, EvalOptions, RunOptions, TrainOptions, VariantConfig
from trimtab.train.search import SweepOptions

NOT_KEYS = {RunOptions: {"root"}, Source: {"held", "held_out", "rows"}, VariantConfig: {"name", "options"}}
"""Fields that a run file has no key for."""
WRITTEN = {(RunOptions, "variants"): "map", (VariantConfig, "method"): "name", (VariantConfig, "objective"): "name"}
"""Types that a run file writes in another way than the class holds them."""
DEFAULTS = {(Source, "path"): "required", (VariantConfig, "objective"): "sft"}
"""Defaults of a run file, where the class, which Python calls too, has another."""
KINDS = {str: "text", int: "int", float: "float", bool: "bool", Any: "any", NoneType: "null"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
ROUTES = {"/v1": "Answers and adapters", "/admin": "Administration", "": "More"}
VERBS = ("get", "post", "patch", "delete")


class Key(NamedTuple):
    """One key of a run file."""

    name: str
    type: str
    default: str
    meaning: str


def keys() -> str:
    """Tables of the keys that a run file may have, one for each class."""
    parts = [
        (
            "The run",
            RunOptions,
            "At the top of a run file. `defaults` stands there too: [training options](#training-options) for all variants.",
        ),
        ("A data set", DataConfig, "Under `data`, below the data set's name."),
        ("A source", Source, "In `train`, `valid` and `test`: a path alone, or a mapping with these keys."),
        (
            "A variant",
            VariantConfig,
            "Under `variants`, below the variant's name. It also has the training options, and the keys of its method and objective.",
        ),
        ("Training options", TrainOptions, "Under `defaults` for all variants, or in a variant for itself."),
        ("Scores", EvalOptions, "Under `evaluate`."),
        ("A sweep", SweepOptions, "Under `sweep`, in place of `variants`."),
        ("Halving", Halving, "Under `sweep.halving`."),
    ]
    text = [f"## {title}\n\n{where}\n\n{table(keys_of(owner))}" for title, owner, where in parts]
    text.append("## Methods\n\nIn a variant with this `method`. Formulas and shapes are in [methods.md](../methods.md).")
    text += [f"### `method: {name}`\n\n{table(keys_of(owner)) or 'It has no keys of its own.'}" for name, owner in BY_NAME.items()]
    text.append("## Objectives\n\nIn a variant with this `objective`. What they compute is in [objectives.md](../objectives.md).")
    text += [f"### `objective: {name}`\n\n{table(keys_of(owner)) or 'It has no keys of its own.'}" for name, owner in OBJECTIVES.items()]
    text.append(
        f"## A reward\n\nIn `rewards` of `objective: grpo`: a name alone, or a mapping with these keys.\n\n{table(keys_of(Reward))}"
    )
    return "\n\n".join(text)


def keys_of(owner: type) -> Iterator[Key]:
    """The keys that a class of the run file takes, in the order in which it has them."""
    if issubclass(owner, BaseModel):
        told = described(owner, owner.model_fields)
        for name, f in owner.model_fields.items():
            if name not in NOT_KEYS.get(owner, ()):
                bound = bounds(f.metadata)
                default = "required" if f.is_required() else shown(f.get_default(call_default_factory=True))
                written = WRITTEN.get((owner, name)) or spelled(f.annotation, bound)
                yield Key(name, written, DEFAULTS.get((owner, name), default), f.description or told.get(name, ""))
        return
    hints = get_type_hints(owner, include_extras=True)
    told = described(owner, [f.name for f in dataclasses.fields(owner)])
    fields = [f for f in dataclasses.fields(owner) if f.name not in NOT_KEYS.get(owner, ())]
    for f in fields:
        made = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        default = DEFAULTS.get((owner, f.name)) or ("required" if made is dataclasses.MISSING else shown(made))
        yield Key(f.name, spelled(hints[f.name]), default, told.get(f.name, ""))


def described(owner: type, names: Iterable[str]) -> dict[str, str]:
    """What the docstrings of a class and of those below it say of each field: "r: rank. lora_alpha, lora_dropout: …"."""
    found: dict[str, str] = {}
    known = "|".join(sorted(names, key=len, reverse=True))
    for cls in owner.__mro__:
        if cls in (object, BaseModel, Hyperparameters) or not cls.__doc__:
            continue
        text = " ".join(inspect.cleandoc(cls.__doc__).split())
        marks = list(re.finditer(rf"(?:^|(?<=[.;] ))((?:{known})(?:, (?:{known}))*): ", text))
        for mark, after in zip(marks, [*marks[1:], None], strict=False):
            meaning = text[mark.end() : after.start() if after else len(text)].strip().rstrip(".;")
            for name in mark[1].split(", "):
                found.setdefault(name, meaning)
    return found


def bounds(metadata: Iterable[Any]) -> str:
    """The limits that pydantic's constraints set, such as "≥ 1"."""
    return " and ".join(said.format(getattr(m, side)) for m in metadata for side, said in BOUNDS.items() if hasattr(m, side))


def spelled(hint: Any, bound: str = "") -> str:
    """An annotation in a reader's words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return spelled(inner[0], bound or bounds(inner[1:]))
    if origin is Literal:
        return ", ".join(f"`{x}`" for x in inner)
    if origin in (Union, UnionType):
        return " or ".join(spelled(x, bound) for x in inner)
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, (list, tuple))):
        item = next((x for x in inner if x is not Ellipsis), Any)
        return "list of " + ("sources" if item is Source else spelled(item))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "map"
    if hint in (int, float):
        return f"{KINDS[hint]} {bound}".strip()
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel)):
        return "map"
    return KINDS.get(hint) or {"Path": "path"}.get(getattr(hint, "__name__", ""), str(getattr(hint, "__name__", hint)))


def shown(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, BaseModel) or value == {} or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return "{}"
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else value


def table(rows: Iterable[Key]) -> str:
    """Keys as a table; empty where there are none."""
    lines = [f"| `{k.name}` | {cell(k.type)} | {cell(code(k.default))} | {cell(k.meaning)} |" for k in rows]
    return stacked(["| key | type | default | meaning |", "|---|---|---|---|", *lines], "keys") if lines else ""


def stacked(lines: Iterable[str], kind: str) -> str:
    """A table whose cells stand below each other where the page is narrow: docs/site/site.css."""
    return f'<div class="{kind}" markdown>\n\n' + "\n".join(lines) + "\n\n</div>"


def code(default: str) -> str:
    return default if default == "required" else f"`{default}`"


def cell(text: str) -> str:
    """Text in a cell, with YAML's null for Python's None: a bar would end it, and an angle bracket begin a tag."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|").replace("None", "null"))
    parts[::2] = [re.sub(r"(?<!\\)\*", r"\\*", p.replace("\\<", "<").replace("<", "&lt;").replace("->", "→")) for p in parts[::2]]
    return "".join(parts)


def python() -> str:
    """Every name of the package, for mkdocstrings: functions first, then what they take and give."""
    groups: dict[str, list[str]] = {"Functions": [], "Objects": [], "Methods": [], "Errors": []}
    homes: Mapping[str, str] = vars(trimtab)["__homes__"]
    for name in trimtab.__all__:
        if name == "__version__":
            continue
        value = getattr(import_module(homes[name]), name)
        if not isinstance(value, type):
            groups["Functions"].append(block(homes[name], name))
        elif issubclass(value, BaseException):
            groups["Errors"].append(block(homes[name], name, members=False))
        elif issubclass(value, Hyperparameters):
            groups["Methods"].append(block(homes[name], name, members=False))
        else:
            groups["Objects"].append(block(homes[name], name, inherited_members=True))
    return "\n\n".join(f"## {title}\n\n" + "\n\n".join(parts) for title, parts in groups.items())


def block(home: str, name: str, **options: bool) -> str:
    """What mkdocstrings replaces by the documentation of a name."""
    lines = [f"::: {home}.{name}", "    options:", "      heading_level: 3"]
    return "\n".join([*lines, *(f"      {key}: {str(value).lower()}" for key, value in options.items())])


def commands() -> str:
    """Every command: what it does, its examples, its arguments and options."""
    return "\n\n".join(_commands("trimtab", main, None))


def _commands(name: str, command: click.Command, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    if parent is not None:
        head = "##" if parent.parent is None else "###"
        yield f"{head} {context.command_path}\n\n{told(command.help or '')}\n\n```text\n{usage(context)}\n```"
        rows = [options(p, context) for p in command.get_params(context) if isinstance(p, click.Option) and "--help" not in p.opts]
        if rows:
            yield stacked(["| option | default | meaning |", "|---|---|---|", *rows], "options")
        if command.epilog:
            yield told(command.epilog)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _commands(inner, found, context)


def usage(context: click.Context) -> str:
    return " ".join([context.command_path, *context.command.collect_usage_pieces(context)])


def told(help: str) -> str:
    """A command's help as Markdown. A paragraph that click is told to leave as it is (\\b) is a heading with indented lines: examples."""
    parts = []
    for paragraph in inspect.cleandoc(help).split("\n\n"):
        kept = paragraph.removeprefix("\b\n")
        if kept == paragraph:
            parts.append(" ".join(prose(paragraph).split()))
            continue
        lines = kept.splitlines()
        title = [lines.pop(0)] if not lines[0].startswith(" ") else []
        parts += [*title, f"```bash\n{dedent(chr(10).join(lines))}\n```"]
    return "\n\n".join(parts)


def options(option: click.Option, context: click.Context) -> str:
    """An option's row of the table."""
    said = option.get_help_extra(context)
    default = said.get("default") or ("required" if said.get("required") else "")
    names = ", ".join(f"`{x}`" for x in [*option.opts, *option.secondary_opts])
    taken = "" if option.is_flag or option.count else f" {cell(option.make_metavar(context))}"
    limit = f" ({said['range']})" if said.get("range") else ""
    return f"| {names}{taken} | {f'`{default}`' if default else ''} | {cell(prose(option.help or '') + limit)} |"


def prose(text: str) -> str:
    """Help in which file names and the like are not taken for Markdown."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*_<\[])", r"\\\1", p) for p in parts[::2]]
    return "".join(parts)


def openapi() -> dict[str, Any]:
    """The OpenAPI document of a server with tenants. Nothing is loaded for it."""
    return create_app(SimpleNamespace(tenants=object(), metrics=None, audit=None)).openapi()  # type: ignore[arg-type]


def http() -> str:
    """Routes, then the bodies and replies that they name, from the server's own OpenAPI document."""
    document = openapi()
    schemas = document["components"]["schemas"]
    routes = [(path, verb, item[verb]) for path, item in document["paths"].items() for verb in VERBS if verb in item]
    text, used = [], set()
    groups: dict[str, list[str]] = {title: [] for title in ROUTES.values()}
    for path, verb, route in routes:
        title = next(t for start, t in ROUTES.items() if path.startswith(start) or (path == "/classify" and start == "/v1"))
        groups[title].append(operation(path, verb, route, used))
    for title, parts in groups.items():
        text.append(f"## {title}\n\n" + "\n\n".join(parts))
    queue, seen = sorted(used), set()
    bodies = []
    while queue:
        name = queue.pop(0)
        if name in seen:
            continue
        seen.add(name)
        said, named = schema(name, schemas[name])
        bodies.append((name, said))
        queue += sorted(named - seen)
    text.append("## Bodies and replies\n\n" + "\n\n".join(said for _, said in sorted(bodies)))
    return "\n\n".join(text)


def operation(path: str, verb: str, route: Mapping[str, Any], used: set[str]) -> str:
    """One route: what it does, what it takes, what it replies."""
    lines = [f"### `{verb.upper()} {path}`", cell(route.get("description", ""))]
    asked = [f"`{p['name']}` ({p['in']}): {kind(p['schema'], used)}" for p in route.get("parameters", ())]
    lines += ["Parameters: " + "; ".join(asked) + "."] if asked else []
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    lines += [f"Body: {kind(body, used)}."] if body else []
    replies = []
    for status, reply in route["responses"].items():
        of = reply.get("content", {}).get("application/json", {}).get("schema")
        said = kind(of, used) if of and int(status) < 400 else ""
        replies.append(f"`{status}`" + (f" {said}" if said and said != "any" else ""))
    used.add("ErrorReply")
    return "\n\n".join([*filter(None, lines), f"Replies: {', '.join(replies)}."])


def schema(name: str, said: Mapping[str, Any]) -> tuple[str, set[str]]:
    """One object's fields as a table, and the objects that they name."""
    used: set[str] = set()
    required = set(said.get("required", ()))
    rows = []
    for field, of in said.get("properties", {}).items():
        default = "required" if field in required else f"`{json.dumps(of['default'])}`" if of.get("default") is not None else "–"
        rows.append(f"| `{field}` | {kind(of, used)} | {default} | {cell(of.get('description', ''))} |")
    head = ["| field | type | default | meaning |", "|---|---|---|---|"] if rows else []
    meaning = said.get("description", "")
    text = [f"### {name}", cell(meaning), stacked([*head, *rows], "keys") if rows else ""]
    return "\n\n".join(filter(None, text)), used


def kind(of: Mapping[str, Any], used: set[str]) -> str:
    """A JSON schema in a reader's words. used: gets the objects that it names."""
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        used.add(name)
        return f"[{name}](#{name.lower()})"
    if options := of.get("anyOf") or of.get("oneOf"):
        return " or ".join(dict.fromkeys(kind(x, used) for x in options))
    if "enum" in of or "const" in of:
        return ", ".join(f"`{x}`" for x in of.get("enum", [of.get("const")]))
    if of.get("type") == "array":
        return f"list of {kind(of.get('items', {}), used)}"
    limits = [f"≥ {of['minimum']}"] if "minimum" in of and abs(of["minimum"]) < 2**31 else []
    limits += [f"≤ {of['maximum']}"] if "maximum" in of and abs(of["maximum"]) < 2**31 else []
    return " ".join(
        [{"string": "text", "integer": "int", "number": "float", "boolean": "bool"}.get(of.get("type", ""), of.get("type", "any")), *limits]
    )
