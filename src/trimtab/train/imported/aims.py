"""What settings of one of TRL's trainers train towards: the command that reads them says it, or a key that only one trainer has."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from trimtab.train.imported.carry import Carry, number
from trimtab.train.imported.groups import groups

TRAINERS = ("sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo")
OWN: Mapping[str, Collection[str]] = {
    "sft": ("assistant_only_loss", "completion_only_loss", "packing", "packing_strategy", "dataset_text_field", "chat_template_path"),
    "dpo": ("precompute_ref_log_probs", "ref_model_init_kwargs", "loss_weights", "discopop_tau", "use_weighting", "f_divergence_type"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "reward": ("center_rewards_coefficient",),
    "grpo": ("importance_sampling_level", "scale_rewards", "delta", "entropy_coef"),
    "rloo": ("normalize_advantages", "reward_clip_range"),
}
"""Keys that one trainer has -> with it what is meant."""
SEVERAL: Mapping[str, Collection[str]] = {
    **dict.fromkeys(("num_generations", "reward_funcs", "epsilon", "num_iterations", "max_completion_length"), ("grpo", "rloo")),
    "label_smoothing": ("dpo", "cpo"),
    "beta": ("dpo", "kto", "orpo", "cpo", "grpo", "rloo"),
}
LOSSES: Mapping[str, Collection[str]] = {
    "sft": ("nll", "chunked_nll", "dft"),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("simpo", "alphapo"),
    "grpo": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
}
"""Values of loss_type that one trainer has; those of dpo and cpo are the same."""
NO_DROPOUT = ("dpo", "ipo", "kto", "orpo", "cpo", "simpo", "reward", "stepwise")
"""Trainers that set all dropout to 0, the adapter's too, unless `disable_dropout` is false."""


def aim_of(c: Carry, plain: str | None) -> str:
    """The trainer. plain: that of settings without any key of these; None: they are refused, as are those that several trainers read."""
    if c.command:
        return c.command
    loss = c.given.get("loss_type")
    loss = loss[0] if isinstance(loss, list) and loss else loss
    found = {name for name, keys in OWN.items() if not c.given.keys().isdisjoint(keys)} | {n for n, of in LOSSES.items() if loss in of}
    left = [set(of) for key, of in SEVERAL.items() if key in c.given]
    if left or len(found) > 1:
        found -= {"sft"}  # a file for two trainings, one of which prepares the other
    if len(found) == 1:
        return found.pop()
    if not left and not found and plain is not None:
        return plain
    may_be = sorted(found) or [n for n in TRAINERS if all(n in of for of in left)] or [n for n in TRAINERS if any(n in of for of in left)]
    names = ", ".join(may_be)
    c.refuse("--from", None, f'the keys do not tell which trainer reads them ({names}): say it, such as --from "{c.program} {may_be[0]}"')
    return may_be[0]


def aimed(c: Carry, aim: str) -> None:
    """Carry what is trained towards, with TRL's defaults where ours differ, after the method's fields."""
    if aim in ("grpo", "rloo"):
        if aim == "rloo":
            c.given["loss_type"] = "rloo"
            for key, theirs in (("num_generations", 2), ("beta", 0.05)):
                c.given.setdefault(key, theirs)
        groups(c, c.take, "")
        if (length := c.variant.get("max_length")) is not None:
            c.lose("max_length", length, "longer prompts are left out here; those trainers take prompts of any length")
        return
    if aim == "sft":
        if (loss := c.take("loss_type")) in ("nll", "chunked_nll"):
            c.needless("loss_type", loss, "it is the one that there is")
        elif loss is not None:
            c.refuse("loss_type", loss, "imitation has one loss here, the likelihood of the answers")
        return
    names = ["beta", "label_smoothing", "loss_weights", "discopop_tau"]
    names += ["desirable_weight", "undesirable_weight", "center_rewards_coefficient"]
    if aim == "cpo":
        simpo = c.given.get("loss_type") == "simpo"
        defaults = {"cpo_alpha": 1.0, **({"simpo_gamma": 0.5, "beta": 0.1} if simpo else {})}
        for key, theirs in defaults.items():
            c.given.setdefault(key, theirs)
        names += ["cpo_alpha", *(["simpo_gamma"] if simpo else [])]
        aim = "simpo" if simpo and c.take("loss_type") else aim
    if aim in ("dpo", "kto", "cpo"):
        names.append("loss_type")
    if c.given.get("f_divergence_type") == "reverse_kl":
        c.needless("f_divergence_type", c.take("f_divergence_type"), "it is the one that there is")
    if aim == "reward" and c.variant["method"] == "full":
        c.refuse("use_peft", False, "the head that gives rewards is a part of an adapter: without one it is not trained")
    c.objective(aim, "loss_type", {n: (n, number(c.take(n))) for n in names if n in c.given})
    without_dropout(c, aim)


def without_dropout(c: Carry, aim: str) -> None:
    """TRL's trainers of pairs and rewards turn the adapter's dropout off, after it has been made."""
    if aim in NO_DROPOUT and c.take("disable_dropout", True) is not False and (value := c.variant.pop("lora_dropout", 0)):
        c.needless("lora_dropout", value, "the trainer turns all dropout off, unless `disable_dropout` is false")
