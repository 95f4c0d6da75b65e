"""Law 11: a trainer of some thirty lines in plain torch, written from the papers and the documentation, follows the same trajectory.

`plainly` has AdamW (Loshchilov & Hutter 2019, algorithm 2), in 8 bits too (Dettmers et al. 2022, with bitsandbytes' table), Adafactor
(Shazeer & Stern 2018, with rates from outside), Muon (Jordan et al. 2024, with the step sizes of Liu et al. 2025), SGD, NEFTune (Jain et
al. 2023), LoRA+ (Hayou et al. 2024), the schedules, clipping by the global norm, the order of rows and the mean over a whole step's
targets, one row at a time on transformers' own model with the hooks of `plain`. Of trimtab it takes start values alone. What
`trimtab.train` writes (losses, norms, rates, counts, tensors) must be the same for every method of the registry and for full fine-tuning,
with options of every kind, all variants in one run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor
from transformers import AutoModelForCausalLM, get_scheduler

from tests.laws.common import CASES, method_of, plain_of
from tests.laws.plain import plain_logits
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.methods import FullConfig, Method
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.config import TrainOptions

DOCUMENTED = {  # docs/run-file.md, "Training options"
    "optimizer": "adamw", "neftune_noise_alpha": None,
    "lr": None, "epochs": 2, "max_steps": None, "batch_size": 16, "gradient_accumulation_steps": 1, "schedule": "cosine", "warmup_steps": 0,
    "loraplus_lr_ratio": None, "weight_decay": 0.0, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "max_length": 1024, "last_turn_only": False, "eval_every": None, "valid_metric": "loss", "patience": None, "keep_best": True,
    "seed": None,
}  # fmt: skip
EVERYTHING = {
    "lr": 1e-2, "max_steps": 5, "batch_size": 3, "gradient_accumulation_steps": 2, "schedule": "cosine", "warmup_steps": 2,
    "weight_decay": 0.2, "max_grad_norm": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3,
}  # fmt: skip
PLAIN = {"lr": 1e-2, "max_steps": 5, "batch_size": 3}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("lora-0", PLAIN),
    "linear": ("lora-0", PLAIN | {"schedule": "linear"}),
    "constant": ("ia3-0", PLAIN | {"schedule": "constant", "warmup_steps": 3}),
    "one-epoch": ("bottleneck-0", {"lr": 1e-2, "epochs": 2.5, "batch_size": 2, "gradient_accumulation_steps": 3, "schedule": "linear"}),
    "decay": ("lora-0", PLAIN | {"weight_decay": 0.5}),
    "adam": ("lora-0", PLAIN | {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-2}),
    "clipped": ("lora-0", PLAIN | {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}),
    "accumulated": ("lora-0", PLAIN | {"gradient_accumulation_steps": 3, "max_grad_norm": 1e6, "seed": 5}),
    "plus": ("lora-0", PLAIN | {"loraplus_lr_ratio": 8.0, "weight_decay": 0.1}),
    "plus-embedding": ("lora-embedding", PLAIN | {"loraplus_lr_ratio": 0.25}),
    "plus-saved": ("lora-saved", PLAIN | {"loraplus_lr_ratio": 4.0}),
    "adamw8bit": ("lora-saved", EVERYTHING | {"optimizer": "adamw8bit"}),
    "adamw8bit-plus": ("lora-embedding", PLAIN | {"optimizer": "adamw8bit", "loraplus_lr_ratio": 4.0}),
    "adafactor": ("lora-2", PLAIN | {"optimizer": "adafactor", "weight_decay": 0.3}),
    "adafactor-vectors": ("ia3-0", PLAIN | {"optimizer": "adafactor"}),
    "muon": ("lora-0", PLAIN | {"optimizer": "muon", "weight_decay": 0.2, "loraplus_lr_ratio": 2.0}),
    "muon-dora": ("lora-2", EVERYTHING | {"optimizer": "muon"}),
    "muon-embedding": ("lora-embedding", PLAIN | {"optimizer": "muon"}),
    "noise": ("lora-0", EVERYTHING | {"neftune_noise_alpha": 5.0}),
    "sgd": ("lora-0", PLAIN | {"optimizer": "sgd", "lr": 0.3, "weight_decay": 0.2}),
}
"""Each option in a variant of its own, beside EVERYTHING at once for every method."""
SEED = 3
ANSWERS = ["ok", "a somewhat longer answer, of many tokens", "no", "42", "a line\nand another", "é", "the seventh"]
Row = tuple[list[int], list[bool]]


def conversations() -> list[dict[str, Any]]:
    """Rows of very different length, of prompt and of answer; one with two answers."""
    rows = [[("user", f"question {i} " + "x" * (5 * i % 17)), ("assistant", a)] for i, a in enumerate(ANSWERS)]
    rows[2] += [("user", "why?"), ("assistant", "it is so")]
    return [{"messages": [{"role": r, "content": c} for r, c in row]} for row in rows]


def encode(row: dict[str, Any]) -> Row:
    """ChatML by hand: every assistant turn is supervised with its end token, nothing else is."""
    tokenizer, ids, supervised = tiny_tokenizer(), [], []
    for m in row["messages"]:
        mine = m["role"] == "assistant"
        for text, learnt in ((f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", mine), ("\n", False)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, supervised = ids + piece, supervised + [learnt] * len(piece)
    return ids, supervised


def micro_batches(rows: list[Row], size: int, seed: int) -> Iterator[tuple[int, list[Row]]]:
    """(epoch, rows). Each epoch anew: the raw stream of NumPy's Philox, keyed by SeedSequence([seed, epoch]), argsorted."""
    epoch = 0
    while True:
        order = np.argsort(np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(len(rows)), kind="stable")
        for start in range(0, len(rows), size):
            yield epoch, [rows[i] for i in order[start : start + size]]
        epoch += 1


def rate(schedule: str, step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


class Adam:
    """fp32 moments; algorithm 2 of Loshchilov & Hutter."""

    def __init__(self, x: Tensor, o: dict[str, Any]):
        self.o, self.m, self.v = o, torch.zeros_like(x), torch.zeros_like(x)

    def step(self, x: Tensor, g: Tensor, t: int, lr: float) -> None:
        b1, b2 = self.o["adam_beta1"], self.o["adam_beta2"]
        m, v = (b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g.square())
        x -= lr * self.o["weight_decay"] * x
        x -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.o["adam_epsilon"])
        self.m, self.v = self.kept(m, True), self.kept(v, False)

    def kept(self, moment: Tensor, signed: bool) -> Tensor:
        return moment


class Adam8(Adam):
    """Each 256 numbers of a moment rounded to the nearest of 256 times their largest."""

    def kept(self, moment: Tensor, signed: bool) -> Tensor:
        table, flat = create_dynamic_map(signed), moment.flatten().clone()
        for start in range(0, len(flat), 256):
            block = flat[start : start + 256]
            if scale := block.abs().max().item():
                block.copy_(table[(block[:, None] / scale - table).abs().argmin(1)] * scale)
        return flat.view_as(moment)


class Factored:
    """Adafactor of Shazeer & Stern: the mean square as a product of row and column means, updates clipped at a mean square of 1."""

    def __init__(self, x: Tensor, o: dict[str, Any]):
        self.o = o
        self.v = [torch.zeros(x.shape[0]), torch.zeros(x.shape[1])] if x.dim() == 2 else [torch.zeros_like(x)]

    def step(self, x: Tensor, g: Tensor, t: int, lr: float) -> None:
        square, decay = g.square() + 1e-30, 1 - t**-0.8
        now = [square.mean(1), square.mean(0)] if x.dim() == 2 else [square]
        self.v = [decay * v + (1 - decay) * new for v, new in zip(self.v, now, strict=True)]
        v = torch.outer(self.v[0] / self.v[0].mean(), self.v[1]) if x.dim() == 2 else self.v[0]
        update = g / v.sqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        x -= lr * self.o["weight_decay"] * x
        x -= lr * update


class Orthogonal:
    """Muon: Nesterov momentum, five steps of Newton and Schulz towards its nearest orthogonal matrix, of the size of AdamW's steps."""

    def __init__(self, x: Tensor, o: dict[str, Any]):
        self.o, self.momentum = o, torch.zeros_like(x)

    def step(self, x: Tensor, g: Tensor, t: int, lr: float) -> None:
        self.momentum = 0.95 * self.momentum + 0.05 * g
        X = (0.05 * g + 0.95 * self.momentum).bfloat16()
        tall = X.shape[0] > X.shape[1]
        X = X.T if tall else X
        X = X / (X.norm() + 1e-7)
        for _ in range(5):
            A = X @ X.T
            X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
        x -= lr * self.o["weight_decay"] * x
        x -= lr * 0.2 * math.sqrt(max(x.shape)) * (X.T if tall else X)


class Descent:
    """The gradient and the decay as a part of it."""

    def __init__(self, x: Tensor, o: dict[str, Any]):
        self.o = o

    def step(self, x: Tensor, g: Tensor, t: int, lr: float) -> None:
        x -= lr * (g + self.o["weight_decay"] * x)


def stepping(key: str, x: Tensor, o: dict[str, Any]) -> Adam | Factored | Orthogonal | Descent:
    """What steps a tensor: of few numbers AdamW takes the place of 8 bits; of vectors, embeddings and the head, that of Muon."""
    by = o["optimizer"]
    if (by == "adamw8bit" and x.numel() < 4096) or (by == "muon" and (x.dim() != 2 or "embed" in key or "lm_head" in key)):
        by = "adamw"
    return {"adamw": Adam, "adamw8bit": Adam8, "adafactor": Factored, "muon": Orthogonal, "sgd": Descent}[by](x, o)


def neftune(alpha: float | None, tokens: int, drawn_by: tuple[int, int, int]) -> Tensor:
    """Jain et al. 2023, algorithm 1: uniform in ±alpha / √(tokens · width). The generator's seed is what docs/run-file.md says."""
    width = tiny_model("llama").config.hidden_size
    if alpha is None:
        return torch.zeros(tokens, width)
    digest = hashlib.sha256(np.array(drawn_by, dtype=np.int64).tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    bound = alpha / math.sqrt(tokens * width)
    return torch.empty(tokens, width).uniform_(-bound, bound, generator=generator)


def with_noise(model: Any, logits: Callable[[list[int]], Tensor]) -> Callable[[list[int], Tensor], Tensor]:
    """Logits of token ids with something added to their embeddings."""

    def noisy(ids: list[int], noise: Tensor) -> Tensor:
        hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output + noise)
        try:
            return logits(ids)
        finally:
            hook.remove()

    return noisy


def plainly(
    p: dict[str, Tensor], logits: Callable[[list[int], Tensor], Tensor], rows: list[Row], o: dict[str, Any], fast: set[str]
) -> list[dict[str, Any]]:
    """Train the leaves `p` in place; a line a step. logits: of token ids and what is added to their embeddings. fast: names of LoRA+'s B
    matrices."""
    optimizers = {k: stepping(k, x, o) for k, x in p.items()}
    stream, lines = micro_batches(rows, o["batch_size"], o["seed"]), []
    for t in range(o["max_steps"]):
        drawn = [next(stream) for _ in range(o["gradient_accumulation_steps"])]
        step_rows = [row for _, part in drawn for row in part]
        targets, loss = sum(sum(s[1:]) for _, s in step_rows), 0.0
        g = {k: torch.zeros_like(x) for k, x in p.items()}
        for row, (ids, supervised) in enumerate(step_rows):
            noise = neftune(o["neftune_noise_alpha"], len(ids), (o["seed"], t, row))
            places = [i for i in range(1, len(ids)) if supervised[i]]
            nll = F.cross_entropy(logits(ids, noise)[[i - 1 for i in places]], torch.tensor(ids)[places], reduction="sum") / targets
            for k, x in zip(p, torch.autograd.grad(nll, list(p.values())), strict=True):
                g[k] += x
            loss += nll.item()
        norm = math.sqrt(sum(x.double().square().sum().item() for x in g.values()))
        lr = o["lr"] * rate(o["schedule"], t, o["warmup_steps"], o["max_steps"])
        with torch.no_grad():
            for k, x in p.items():
                gradient = g[k] * min(1.0, o["max_grad_norm"] / norm)
                optimizers[k].step(x, gradient, t + 1, lr * (o["loraplus_lr_ratio"] if k in fast else 1.0))
        tokens = sum(len(ids) for ids, _ in step_rows)
        lines.append({"step": t + 1, "epoch": drawn[-1][0], "loss": loss, "grad_norm": norm, "lr": lr})
        lines[-1] |= {"tokens": tokens, "supervised_tokens": targets}
    return lines


@dataclass(frozen=True)
class Case:
    """A variant: its method, what its run file says, all its options with the documented defaults."""

    method: Method
    said: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        o = DOCUMENTED | {"seed": SEED} | self.said
        batches = math.ceil(len(ANSWERS) / o["batch_size"])
        return o | {"max_steps": o["max_steps"] or math.ceil(o["epochs"] * batches / o["gradient_accumulation_steps"])}

    @property
    def fields(self) -> dict[str, Any]:
        """The method as a run file writes it."""
        own = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
        return {"method": self.method.name} | {k: list(x) if isinstance(x, tuple) else x for k, x in own.items()}


def cases() -> dict[str, Case]:
    spec = Base(tiny_model("llama"), tiny_tokenizer()).spec
    found = {c: Case(method_of(c, spec), EVERYTHING) for c in CASES}
    found |= {name: Case(method_of(c, spec), said) for name, (c, said) in OPTIONS.items()}
    return found | {f"full{by}": Case(FullConfig(), EVERYTHING | {"lr": 1e-3} | said) for by, said in FULL.items()}


FULL: dict[str, dict[str, Any]] = {"": {}, "-8bit": {"optimizer": "adamw8bit"}, "-muon": {"optimizer": "muon"}}
NAMES = [*CASES, *OPTIONS, *(f"full{by}" for by in FULL)]


@dataclass(frozen=True)
class Ran:
    """The joint run. lines: of metrics.jsonl, by variant."""

    cases: dict[str, Case]
    lines: dict[str, list[dict[str, Any]]]
    adapters: dict[str, Adapter]
    out: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("law11")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()), encoding="utf-8")
    everyone = cases()
    content = {
        "base": "tiny",
        "out": "out",
        "seed": SEED,
        "max_tokens": 256,  # steps are cut, and variants share forwards
        "data": {"d": {"train": "rows.jsonl"}},
        "variants": {name: {"data": "d"} | c.fields | c.said for name, c in everyone.items()},
    }
    report = train(RunConfig.from_dict(content, root=root), base=Base(tiny_model("llama"), tiny_tokenizer()))
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in (report.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        lines.setdefault((entry := json.loads(line))["variant"], []).append(entry)
    return Ran(everyone, lines, report.adapters, report.out)


def leaves(name: str, case: Case) -> tuple[dict[str, Tensor], Callable[[list[int], Tensor], Tensor], set[str]]:
    """Start values, the logits that they give in transformers' own model with noise, the names of the B matrices."""
    if name.startswith("full"):
        model = tiny_model("llama")
        model.set_attn_implementation("eager")
        return dict(model.named_parameters()), with_noise(model, lambda ids: plain_logits(model, None, ids)), set()
    base = Base(tiny_model("llama"), tiny_tokenizer())
    adapter = Adapter.create(base, case.method, seed=case.options["seed"])
    adapter.params = {k: t.detach().clone().requires_grad_() for k, t in adapter.params.items()}
    model = plain_of("llama")
    fast = {k for k in adapter.params if re.search(r"\.lora_B\.", k)} if case.options["loraplus_lr_ratio"] else set()
    trained, alpha = {k: x for k, x in adapter.params.items() if not k.endswith(".start")}, case.options["neftune_noise_alpha"]
    if alpha is None:
        return trained, lambda ids, noise: plain_logits(model, adapter, ids), fast
    return trained, with_noise(model, lambda ids: plain_logits(model, adapter, ids)), fast


def folded(p: dict[str, Tensor], start: dict[str, Tensor], method: Method) -> dict[str, Tensor]:
    """As they are saved: a prefix's MLP (Li & Liang 2021) is folded away, PiSSA's start (Meng et al. 2024) is subtracted."""
    if getattr(method, "init_lora_weights", True) == "pissa":
        pairs = {k: start[k.replace("lora_B", "lora_A")] for k in p if "lora_B" in k}
        return {k: torch.cat([x - start[k], start[k]], 1) for k, x in p.items() if k in pairs} | {
            k.replace("lora_B", "lora_A"): torch.cat([p[k.replace("lora_B", "lora_A")], p[k.replace("lora_B", "lora_A")] - A0])
            for k, A0 in pairs.items()
        }
    if "transform.0.weight" not in p:
        return p
    hidden = torch.tanh(F.linear(p["embedding.weight"], p["transform.0.weight"], p["transform.0.bias"]))
    return {"prompt_embeddings": F.linear(hidden, p["transform.2.weight"], p["transform.2.bias"])}


@pytest.mark.parametrize("name", NAMES)
def test_the_trajectory_is_the_independent_trainers(ran: Ran, name: str) -> None:
    case = ran.cases[name]
    p, logits, fast = leaves(name, case)
    start = {k: x.detach().clone() for k, x in p.items()}
    want = plainly(p, logits, [encode(row) for row in conversations()], case.options, fast)
    got = ran.lines[name]
    rough = 25 if "muon" in name else 1  # Newton and Schulz run in bfloat16
    for key in ("step", "epoch", "tokens", "supervised_tokens"):
        assert [e[key] for e in got] == [e[key] for e in want], key
    for key, tolerance in (("lr", 1e-12), ("loss", rough * 1e-5), ("grad_norm", rough * 1e-4)):
        assert [e[key] for e in got] == pytest.approx([e[key] for e in want], rel=tolerance, abs=0), key
    if name.startswith("full"):
        found = dict(AutoModelForCausalLM.from_pretrained(ran.out / "adapters" / name, dtype=torch.float32).named_parameters())
    else:
        found = ran.adapters[name].params
    assert found.keys() == folded(p, start, case.method).keys()
    for key, tensor in folded(p, start, case.method).items():
        moved, tensor = (tensor - folded(start, start, case.method)[key]).norm().item(), tensor.detach()
        # of the whole tensor: where a gradient is next to nothing, Adam makes a large step of a rounding
        assert (found[key].detach() - tensor).norm().item() <= rough * 2e-3 * moved + 1e-6, key


def test_the_rates_are_those_of_transformers_schedules() -> None:
    """Of the formula above. In warm-up ours is one step ahead: transformers takes a first step at a rate of 0."""
    for schedule in ("constant", "linear", "cosine"):
        for warmup in (0, 4):
            name = "constant_with_warmup" if schedule == "constant" else schedule
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=11).lr_lambdas[0]
            for step in range(11):
                want = theirs(step + 1 if step < warmup else step)
                assert rate(schedule, step, warmup, 11) == pytest.approx(want, abs=1e-12), (schedule, warmup, step)


def test_what_is_not_said_is_as_documented() -> None:
    defaults = TrainOptions().model_dump()
    assert defaults == DOCUMENTED
    table = (Path(__file__).parents[2] / "docs" / "run-file.md").read_text(encoding="utf-8")
    for key, value in DOCUMENTED.items():
        row = re.search(rf"^\| .*`{key}`.*\|", table, re.MULTILINE)
        assert row is not None, key
        if isinstance(value, float | int) and not isinstance(value, bool):
            cell = row[0].split("|")[3]
            assert any(float(x.strip(" `")) == value for x in cell.split(",")), row[0]
