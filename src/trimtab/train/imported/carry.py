"""What becomes of another program's settings: each key is carried over, needs nothing here, or is named as not carried."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab.errors import ConfigError
from trimtab.foreign import OURS
from trimtab.methods import BY_NAME, lora_start
from trimtab.objectives import OBJECTIVES
from trimtab.train.config import RunConfig
from trimtab.train.optimizers import WITHOUT_ADAM
from trimtab.train.options import VALIDATION, TrainOptions
from trimtab.train.runfile import shown
from trimtab.train.sinks import missing


@dataclass(frozen=True)
class Note:
    """A key of the other program with its value, and why it is not in the run file, or what differs."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.value)}: {self.why}"


@dataclass
class Carry:
    """Settings on their way into a run file.

    program, command: whose they are, and which of its trainers reads them, where that is said. given: the other program's keys that are
    not looked at yet. folder: where its relative paths start. root: where the run file's do. run,
    data, variant: the run file's parts. idle: keys that need nothing here. lost: keys that are not carried, so that the run differs.
    refused: keys without which it would be another training: there is no run file then.
    """

    program: str
    given: dict[str, Any]
    folder: Path
    root: Path
    run: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    variant: dict[str, Any] = field(default_factory=lambda: {"data": "rows"})
    idle: list[Note] = field(default_factory=list)
    lost: list[Note] = field(default_factory=list)
    refused: list[Note] = field(default_factory=list)
    command: str = ""

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which has been looked at then; null is as if it were absent."""
        value = self.given.pop(key, None)
        return default if value is None else value

    def lose(self, key: str, value: Any, why: str) -> None:
        self.lost.append(Note(key, value, why))

    def needless(self, key: str, value: Any, why: str) -> None:
        self.idle.append(Note(key, value, why))

    def refuse(self, key: str, value: Any, why: str) -> None:
        self.refused.append(Note(key, value, why))

    def set_aside(self, data: str | None, *keys: str) -> None:
        """Take these keys, which name rows, out of the settings where rows were named in their place."""
        for key in keys if data is not None else ():
            if (value := self.take(key)) is not None:
                self.needless(key, value, "--data names the rows in its place")

    def option(self, ours: str, key: str, value: Any) -> None:
        """A training option, where this trimtab has it and takes the value."""
        if value is None:
            return
        try:
            TrainOptions(**{ours: value})
            self.variant[ours] = value
        except ValidationError as e:
            self.lose(key, value, f"{ours} does not take it: {e.errors()[0]['msg']}")

    def renamed(self, *ours: str) -> None:
        """Carry the training options that have another name there (`foreign.OURS`), or the same."""
        for name in ours:
            for key in (name, *OURS.get(name, ())):
                if (value := self.take(key)) is not None:
                    self.option(name, key, number(value))

    def pace(self) -> None:
        """How often lines of the log and checkpoints are written, and how many checkpoints are kept. A part below 1 is one of all steps."""
        for ours, key in (("log_every", "logging_steps"), ("checkpoint_every", "save_steps"), ("keep_checkpoints", "save_total_limit")):
            value = number(self.take(key))
            if value and (isinstance(value, int) or (0 < value < 1 and ours == "checkpoint_every")) and value > 0:
                self.run[ours] = value
            elif value:
                self.lose(key, value, f"write `{ours}`, a whole number")

    def top(self, ours: str, key: str, value: Any) -> None:
        """A key of the run, where this trimtab has it."""
        if ours in RunConfig.model_fields:
            self.run[ours] = value
        else:
            self.lose(key, value, f"this trimtab has no `{ours}`")

    def objective(self, name: str, key: str, fields: Mapping[str, tuple[str, Any]]) -> None:
        """What is trained towards. fields: our field -> (the other's key, the value), of those that are given."""
        if name not in OBJECTIVES:
            self.refuse(key, name, f"this trimtab has no objective `{name}`, and imitating the answers would be another training")
            return
        self.variant["objective"] = name
        known = {f.name for f in dataclasses.fields(OBJECTIVES[name])}
        for ours, (theirs, value) in fields.items():
            if value is None:
                continue
            if ours not in known:
                self.lose(theirs, value, f"the objective `{name}` has no field `{ours}`")
            elif wrong := _refusal(name, ours, value):
                self.refuse(theirs, value, wrong)
            else:
                self.variant[ours] = value

    def method_field(self, ours: str, key: str, value: Any) -> None:
        """A field of the variant's method, where it has it."""
        if value is None:
            return
        if ours in {f.name for f in dataclasses.fields(BY_NAME[self.variant["method"]])}:
            self.variant[ours] = value
        else:
            self.lose(key, value, f"the method `{self.variant['method']}` has no field `{ours}`")

    def quantised(
        self,
        four: Any,
        eight: Any,
        keys: tuple[str, str] = ("load_in_4bit", "load_in_8bit"),
        *,
        kind: Any = None,
        double: Any = None,
    ) -> None:
        """A base in 4 or 8 bits. kind: of 4 bits, nf4 where None. double: whether its scales are quantised too."""
        packed = f"{kind or 'nf4'}{'-double' if double else ''}"
        for key, value, name in ((keys[0], four, packed), (keys[1], eight, "int8")):
            if value:
                self.top("quantize", key, name)

    def optimizer(self, key: str, value: Any) -> None:
        """What steps. Options of AdamW's go where the chosen one has none."""
        if value is None:
            return
        plain = str(value).lower().replace("-", "_")
        ours = next((name for name, theirs in _OPTIMIZERS.items() if plain in theirs), None)
        if ours is None:
            self.lose(key, value, "there is none here: AdamW is used; choose `lr` for it")
        elif ours == "adamw":
            self.needless(key, value, "AdamW is the optimizer where none is named")
        else:
            self.variant["optimizer"] = ours
        if "paged" in plain:
            self.needless("paged", value, "nothing is paged out: the state of adapters is small")
        for option in [k for k in ("adam_beta1", "adam_beta2", "adam_epsilon") if ours in WITHOUT_ADAM and k in self.variant]:
            self.needless(option, self.variant.pop(option), f"{ours} has no such option")

    def schedule(self, key: str, value: Any) -> None:
        """The decay, by transformers' names. Its `constant` has no warm-up."""
        if value is None:
            return
        name = {"constant_with_warmup": "constant"}.get(str(value), str(value))
        if name not in ("constant", "linear", "cosine"):
            self.lose(key, value, "there are constant, linear and cosine: cosine is used")
            return
        self.variant["schedule"] = name
        if value == "constant" and (warmup := self.variant.pop("warmup_steps", None)):
            self.needless("warmup", warmup, "the schedule `constant` has no warm-up in transformers")

    def dtype(self, bf16: Any, fp16: Any) -> None:
        if bf16 == "auto":
            return
        if bf16:
            self.run["dtype"] = "bfloat16"
        elif fp16:
            self.run["dtype"] = "float16"
        elif bf16 is False:
            self.run["dtype"] = "float32"

    def track(self, key: str, value: Any, names: Collection[str]) -> None:
        for name in names:
            if name not in ("tensorboard", "wandb"):
                self.lose(key, value, "there are tensorboard and wandb")
            elif problem := missing(name):
                self.lose(key, value, f"write `track: [{name}]` where the package is there: {problem}")
            else:
                self.run.setdefault("track", []).append(name)

    def end(self, idle: Mapping[str, str], lost: Mapping[str, str], refused: Mapping[str, str]) -> None:
        """What is left: keys that need nothing, that are not carried, or that nobody knows. A key that is off needs nothing, and neither
        does one of validation where no rows are held out."""
        if self.data["rows"].keys().isdisjoint(("valid", "split")):
            for ours in [name for name in VALIDATION if name in self.variant]:
                self.needless(next(iter(OURS[ours])), self.variant.pop(ours), "there are no rows to validate on")
        if lora_start.subtracted(self.variant.get("init_lora_weights", True)) and (dropout := self.variant.pop("lora_dropout", 0)):
            self.lose("lora_dropout", dropout, "a start that is subtracted again allows no dropout: it is 0")
        for key, value in self.given.items():
            if is_off(value):
                if value is not None:
                    self.needless(key, value, "it is off")
            elif key in idle:
                self.needless(key, value, idle[key])
            elif key in refused:
                self.refuse(key, value, refused[key])
            else:
                self.lose(key, value, lost.get(key, f"trimtab does not know this key of {self.program}"))
        self.given.clear()


def _refusal(name: str, field: str, value: Any) -> str:
    """Why an objective does not take a value for a field; "" where it does."""
    try:
        OBJECTIVES[name](**{field: value})
    except ConfigError as e:
        return next((f"{name}: {p}" for p in e.problems if p.startswith((f"{field} ", f"{field}:"))), "")
    return ""


def is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", "none", "None", "no", "false") or (isinstance(value, list | dict) and not value)


def number(value: Any) -> Any:
    """A number that is written as text ("2e-5" is text in YAML 1.1); anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = float(value)
    except ValueError:
        return value
    return int(found) if found == int(found) and not set(value) & set(".eE") else found


_OPTIMIZERS: Mapping[str, Collection[str]] = {
    "adamw": (
        *("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision", "adamw_torch_xla"),
        *("adamw_torch_npu_fused", "paged_adamw", "paged_adamw_32bit", "optimi_adamw", "ao_adamw_fp8"),
    ),
    "adamw8bit": ("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "paged_adamw_8bit", "ao_adamw_8bit", "adamw8bit"),
    "adafactor": ("adafactor",),
    "muon": ("muon",),
    "sgd": ("sgd",),
}
"""Our optimizer -> names that others give it."""
