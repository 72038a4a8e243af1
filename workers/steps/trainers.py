"""Trainers that all training processes of a job build and advance together.

The runner is process 0 and does the job's steps. The others hold no claim and write nothing: they `follow`, which is
to build the same trainer from the same arguments and to train in lock-step with it for as long as it does.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from latency_profiler.errors import SecateursError
from workers.parallel import Ranks
from workers.steps.context import Context
from workers.training import PruningNetTrainer, ScratchTrainer, Trainer, TrainingSettings

T = TypeVar("T", bound=Trainer)
log = logging.getLogger(__name__)
SLICE = 45.0
"""Seconds of training between checkpoints: what a kill costs at most."""


def pruning_net(context: Context, band: Sequence[float] | None) -> PruningNetTrainer:
    """Of the job's space and settings; see `PruningNetTrainer`."""
    low_high = None if band is None else (band[0], band[1])
    settings = TrainingSettings.of(context.spec.training.model_dump())
    return PruningNetTrainer(
        context.space, context.data, settings, context.spec.seed, low_high, context.device, context.team
    )


def scratch(
    context: Context, channels: Sequence[int], settings: Mapping[str, Any], whole: bool = True
) -> ScratchTrainer:  # fmt: skip
    """Of one structure, with a request's fields as settings, on the whole training set or the sub-training set."""
    data = context.data if whole else replace(context.data, training=context.data.sub_training)
    return ScratchTrainer(
        context.space, tuple(channels), data, TrainingSettings.of(settings), context.spec.seed, context.device,
        context.team,
    )  # fmt: skip


MAKERS: tuple[Callable[..., Trainer], ...] = (pruning_net, scratch)


def build(
    context: Context, make: Callable[..., T], arguments: Mapping[str, Any], checkpoint: str | None,
    counters: Mapping[str, Any] | None,
) -> T:  # fmt: skip
    """A trainer on all processes, that goes on from a checkpoint if there is one.

    Args:
        make: one of those that the other processes `follow` with.
        arguments: of `make`, as JSON.
    """
    context.team.tell({"build": make.__name__, "arguments": dict(arguments)})
    made = partial(make, context, **arguments)
    if checkpoint is None or counters is None:
        trainer = made()
    else:
        trainer = context.restored(made, checkpoint, dict(counters))
    context.team.tell(trainer.counters())
    trainer.align(trainer.counters())
    return trainer


def advance(context: Context, trainer: Trainer, progress: Callable[[], dict[str, Any]]) -> None:
    """Train for a slice; all processes end it after the same iteration."""
    context.team.tell({"advance": type(trainer).__name__})
    trainer.advance(context.pause(SLICE, progress))


def follow(team: Ranks, make_context: Callable[[], Context], makers: Sequence[Callable[..., Trainer]]) -> None:
    """Do what process 0 tells, until it sends this process home."""
    known = {make.__name__: make for make in makers}
    context: Context | None = None
    held: dict[str, Trainer] = {}
    while (order := team.hear()) is not None:
        if "advance" in order:
            held[order["advance"]].advance(lambda: False)
            continue
        context = context or make_context()
        held.clear()
        try:
            trainer = known[order["build"]](context, **order["arguments"])
        except SecateursError as error:  # process 0 has the same one, and ends the job with it
            log.warning("process %d: %s", team.rank, error)
            continue
        if (counters := team.hear()) is None:
            return
        trainer.align(counters)
        held[type(trainer).__name__] = trainer
