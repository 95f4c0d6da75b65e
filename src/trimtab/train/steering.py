"""What a run in progress does about the orders in its control.json (`train.control`): it stops, pauses and clones variants between steps.

The first rank looks whether the file has changed, one `stat` a step, and tells the others what it says. Whatever is wrong with the file or
with an order, the run goes on as it is and warns.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.bases.shapes import Architecture
from trimtab.errors import ConfigError, DataError, TrimtabError, first_of, printable
from trimtab.memory import explained
from trimtab.places.place import Place, RankLost
from trimtab.train.before import refuse_sharded, refuse_too_much
from trimtab.train.clone import ALONE, TOGETHER, with_clone
from trimtab.train.control import SHOWN, Clone, Orders, Watched, read_orders
from trimtab.train.dry import unrewarded
from trimtab.train.evaluate import HeldOut
from trimtab.train.interrupt import Stop
from trimtab.train.keeper import Keeper
from trimtab.train.listen import Listener
from trimtab.train.options import VariantConfig
from trimtab.train.prepare import Prepared, headed, make_variant, refuse_long, refuse_uninvoked, row_options
from trimtab.train.resume import identity
from trimtab.train.sinks import Sink
from trimtab.train.teachers import measured_by
from trimtab.train.validate import Validator, ahead
from trimtab.train.variant import Variant

POLL_S = 0.2
"""Between two looks at the file while nothing trains."""
BY_HAND = "stopped by hand at step "
"""How `progress.finished_early` begins for a variant that was told to stop."""

MAX_WHY = 2000
"""Characters of why a clone is refused: settings that a hand has written may be long."""


class Steering:
    """Says which variants make the next step. tests: held-out rows that the run scores at its end."""

    def __init__(self, keeper: Keeper, validator: Validator, tests: dict[str, HeldOut], listener: Listener):
        self._keeper, self._validator, self._tests, self._listener = keeper, validator, tests, listener
        self._watched = Watched(self._prepared.run.out)
        self._paused: set[str] = set()
        self._refused: dict[str, tuple[Clone, str]] = {}

    @property
    def _prepared(self) -> Prepared:
        return self._keeper.prepared

    @property
    def _place(self) -> Place:
        return self._prepared.place

    def going(self, metrics: Sink, stop: Stop, between: Callable[[], None]) -> list[Variant]:
        """The variants that make the next step; none once all have ended. While all that have not are paused, it waits for another order,
        and calls `between` now and then. Interrupted where the run is told to end."""
        waits = False
        while True:
            self._look(metrics)
            live = [v for v in self._prepared.variants if v.live]
            going = [v for v in live if v.name not in self._paused]
            if going or not live:
                return going
            if not waits:
                self._keeper.secure()
                self._place.once(self._tell)
                self._listener.note(f"all variants are paused: the run waits for `trimtab runs resume {self._prepared.run.out}`")
            waits = True
            between()
            time.sleep(POLL_S)
            if signum := self._place.most(stop.signum):
                self._keeper.leave(signum)

    def _look(self, metrics: Sink) -> None:
        """Read the orders if they have changed, and obey them."""
        if not self._place.most(int(self._place.first and self._watched.changed())):
            return
        orders, problems = self._place.once(self._read)
        for problem in problems:
            self._listener.warning(problem)
        if orders is None:
            return
        if orders.end:
            self._keeper.leave(signal.SIGINT)
        self._refused = {name: told for name, told in self._refused.items() if name in orders.clones}
        for name, clone in orders.clones.items():
            self._welcome(name, clone)
        known = {v.name: v for v in self._prepared.variants}
        strange = [printable(name[:80]) for name in orders.variants if name not in known and name not in self._refused]
        if strange:
            self._listener.warning(f"control.json names no variants of this run: {', '.join(first_of(strange, SHOWN))}")
        self._stop([v for n, v in known.items() if v.live and orders.variants.get(n) == "stop"], metrics)
        self._pause({n for n, v in known.items() if v.live and orders.variants.get(n) == "pause"})
        self._place.once(self._tell)

    def _read(self) -> tuple[Orders | None, list[str]]:
        """On the first rank. None where the file is broken: what was ordered before stays."""
        try:
            orders, problems = read_orders(self._prepared.run.out)
        except (DataError, OSError) as error:
            why = error.message if isinstance(error, DataError) else str(error)
            return None, [f"{why}; orders from before stay in force"]
        return orders, [f"control.json: {p}; this counts for nothing" for p in problems]

    def _stop(self, variants: Sequence[Variant], metrics: Sink) -> None:
        """End them as an early stop does: where they have valid rows, they are validated, and their best step is kept."""
        for v in variants:
            v.progress.finished_early = f"{BY_HAND}{v.progress.step}"
            self._listener.stopped(v.name, f"by hand at step {v.progress.step}")
        if variants:
            with self._keeper.within_memory("validating"):
                self._validator.after_step(variants, metrics, self._listener)
            self._keeper.secure()

    def _pause(self, wanted: set[str]) -> None:
        if wanted - self._paused and self._validator.halving is not None:
            self._listener.warning(f"trials of a sweep that halves {TOGETHER}: none is paused")
            wanted = set()
        steps = {v.name: v.progress.step for v in self._prepared.variants if v.live}
        for name in sorted(wanted - self._paused):
            self._listener.note(f"{name} is paused after step {steps[name]}")
        for name in sorted(self._paused - wanted):
            if name in steps:
                self._listener.note(f"{name} goes on after step {steps[name]}")
        self._paused = wanted

    def _welcome(self, name: str, clone: Clone) -> None:
        """Let a clone join, unless it has; where it cannot, say why, once."""
        if self._prepared.clones.get(name) == clone.to_dict():
            return
        if name in self._refused and self._refused[name][0] == clone:
            return
        why = ""
        try:
            with explained(f"making the clone {printable(name[:80])}", ALONE):
                config, variant = self._made(name, clone)
        except RankLost:
            raise
        except TrimtabError as error:
            why = "; ".join([error.message, *first_of(error.problems, SHOWN), *([f"fix: {error.fix}"] if error.fix else [])])
        except Exception as error:  # whatever a setting that nobody has thought of does: the others train on
            why = f"{type(error).__name__}: {error}"
        own = [(self._place.rank, printable(why[:MAX_WHY]))] if why else []
        (whys,) = self._place.added([own])  # memory may be short on one rank alone
        if whys:
            rank, why = whys[0]
            why = why if rank == 0 else f"rank {rank} cannot take it: {why}"
            self._refused[name] = clone, why
            self._listener.warning(f"the clone {printable(name[:80])} does not join: {why}")
            return
        prepared = self._prepared
        self._refused.pop(name, None)
        prepared.run = prepared.run.model_copy(update={"variants": [*prepared.run.variants, config]})
        prepared.variants.append(variant)
        prepared.clones[name] = clone.to_dict()
        self._keeper.joined(identity(prepared, self._keeper.identity["content"]["base"]))
        self._listener.joined(name, variant.total_steps, ahead(self._validator, self._tests))

    def _made(self, name: str, clone: Clone) -> tuple[VariantConfig, Variant]:
        """A clone as the run file would have it, and as it trains. TrimtabError where the run, as it was prepared, cannot take it."""
        prepared = self._prepared
        run, base = prepared.run, prepared.base
        if self._validator.halving is not None:
            raise ConfigError(f"trials of a sweep that halves {TOGETHER}, and a clone would be behind", fix=ALONE)
        extended = with_clone(run, name, clone)
        config = extended.variants[-1]
        alone = run.model_copy(update={"variants": [config]})
        if config.data not in prepared.data:
            raise ConfigError(f"data.{config.data} was not read, since no variant uses it", fix=ALONE)
        mates = [v for v in run.variants if v.data == config.data]
        read_for, asked = ({(v.objective.sampled_at is not None, v.objective.reads_head) for v in of} for of in (mates, [config]))
        if row_options(extended, config.data)[3] is not None or not asked <= read_for:
            what = f"the rows of data.{config.data} were read for other values of max_length, last_turn_only or objective"
            raise ConfigError(what, fix=f"leave these as they are, or {ALONE}")
        refuse_sharded(alone, prepared.place)
        if (error := unrewarded(config, run.root, f"variants.{name}")) is not None:
            raise error
        refuse_long(alone, base, prepared.data)
        refuse_uninvoked(alone, prepared.data)
        splits = prepared.data[config.data]
        full = headed(config, run.data[config.data], splits, f"data.{config.data}")
        references = prepared.references.get((config.data, "train"), {})
        if any(key not in references for _, key in measured_by([full])):
            what = "it measures itself against what the base or a teacher says of its rows, which this run has not computed"
            raise ConfigError(what, fix=ALONE)
        shape = Architecture(base.name, base.spec, base.spec.num_parameters, base.dtype)
        refuse_too_much(alone, shape, self._listener.warning, loaded=True, place=prepared.place)
        variant = make_variant(extended, base, full, splits.train.examples, references.get(full.objective.taught_by))
        if (problem := self._validator.unfit(variant)) is not None:
            raise DataError(problem, fix="name another valid_metric")
        return config, variant

    def _tell(self) -> None:
        """What became of the orders, in run.json."""
        told: dict[str, Any] = {"in_step": self._validator.halving is not None, "paused": sorted(self._paused)}
        live = [v.name for v in self._prepared.variants if v.live]
        told["waits"] = bool(live) and self._paused.issuperset(live)
        told["ended"] = {v.name: v.progress.finished_early for v in self._prepared.variants if v.progress.finished_early}
        told["refused"] = {name: why for name, (_, why) in self._refused.items()}
        self._keeper.describe(told)
