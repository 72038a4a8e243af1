"""Every error that a caller can decide about.

SecateursError
├── InvalidInput                 the caller's mistake; the message says what would be right
│   ├── UnknownSpace
│   ├── NoPruningNet
│   ├── InvalidEncoding
│   ├── InvalidChannels
│   └── InvalidDataset
├── NotFound                     nothing has this name or id
├── AlreadyExists                something has this name already
├── InfeasibleConstraint         no structure of the space satisfies the budget
├── NothingFeasible              no structure was found that satisfies all constraints together
├── BudgetMissed                 pruning ended before the budget was met
├── LayerEmptied                 pruning left a layer without weights
├── DamagedCheckpoint            a checkpoint is missing or not what was saved
├── MissingLatencies             a lookup table lacks layers that were asked for
├── NotCalibrated                a lookup table has no whole networks from which a percentile would follow
├── MeasurementFailed            a layer could not be measured; the reason is data
├── RuntimeUnavailable           the runtime's package is not installed, or the runtime cannot begin
├── NoMeasuringProcess           the process that measures does not start now
└── ServiceError                 the service answered with a problem document
    └── ServiceUnreachable       it did not answer at all
"""

from collections.abc import Sequence
from typing import Any


class SecateursError(Exception):
    """Base of all errors that Secateurs raises on purpose."""


class InvalidInput(SecateursError):
    """A value that the caller gave cannot be used."""


class UnknownSpace(InvalidInput):
    """No search space has this name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name, self.known = name, tuple(known)
        super().__init__(f"unknown space {name!r}; known spaces: {', '.join(known)}")


class NoPruningNet(InvalidInput):
    """A space whose weights no PruningNet can generate: some of its free widths are not followed by batch norm."""

    def __init__(self, space: str) -> None:
        self.space = space
        super().__init__(f"{space} has layers without batch norm, which a PruningNet needs; prune it by another method")


class InvalidEncoding(InvalidInput):
    """An encoding has the wrong length or a gene outside its choices."""


class InvalidChannels(InvalidInput):
    """Channel numbers that the space cannot hold."""


class InvalidDataset(InvalidInput):
    """A dataset that cannot be read safely or at all."""


class NotFound(SecateursError):
    """Nothing of this kind has this name or id.

    Attributes:
        kind, name: what was looked for.
    """

    def __init__(self, kind: str, name: str, known: Sequence[str] = ()) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"no {kind} {name!r}" + (f"; there are: {', '.join(known)}" if known else ""))


class AlreadyExists(SecateursError):
    """Something of this kind has this name already.

    Attributes:
        kind, name: what was to be made.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"there is a {kind} {name!r} already; choose another name")


class InfeasibleConstraint(SecateursError):
    """No structure satisfies a constraint.

    Attributes:
        metric: what is constrained.
        asked: the bound that was asked for, in the metric's unit.
        smallest, largest: the range that the space can reach, in the same unit.
    """

    def __init__(self, metric: str, asked: float, smallest: float, largest: float, device: str | None = None) -> None:
        self.metric, self.asked, self.smallest, self.largest, self.device = metric, asked, smallest, largest, device
        where = f" on {device}" if device else ""
        said, low, high = map(_number, (asked, smallest, largest))
        super().__init__(f"no structure has {metric} within {said}{where}: the space reaches from {low} to {high}")


def _number(value: float) -> str:
    """Counts with all of their digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"


class NothingFeasible(SecateursError):
    """A bounded search found no structure that satisfies all constraints together, though each alone can be met."""

    def __init__(self) -> None:
        super().__init__(
            "no structure was found that satisfies all constraints together; "
            "widen a bound, or lower the least share of the budget that candidates must use"
        )


class BudgetMissed(SecateursError):
    """Pruning ended before the budget was met.

    Attributes:
        metric: what is constrained.
        asked, reached: the bound, and what the last good network has.
    """

    def __init__(self, metric: str, asked: int, reached: int) -> None:
        self.metric, self.asked, self.reached = metric, asked, reached
        super().__init__(f"pruning ended at {metric} {reached:,}, above the budget of {asked:,}")


class LayerEmptied(SecateursError):
    """Pruning left layers without weights, so that the network's output no longer depends on the image.

    Attributes:
        layers, round: which ones, and in which pruning iteration.
    """

    def __init__(self, layers: Sequence[str], number: int) -> None:
        self.layers, self.round = tuple(layers), number
        named = ", ".join(layers)
        super().__init__(f"round {number} left {named} without weights; ask for a larger budget or other qualities")


class DamagedCheckpoint(SecateursError):
    """A checkpoint is missing, or its content is not what was saved."""


class MissingLatencies(SecateursError):
    """A lookup table cannot price these layers.

    Attributes:
        keys: keys of the layers that are neither measured nor inside a measured grid.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        shown = ", ".join(self.keys[:3]) + (f" and {len(self.keys) - 3} more" if len(self.keys) > 3 else "")
        super().__init__(f"the lookup table lacks {len(self.keys)} layers: {shown}; profile the space on this device")


class NotCalibrated(SecateursError):
    """A percentile of a space's networks does not follow from a lookup table: none were measured for it.

    Attributes:
        device, space_key, statistic: what was asked for.
    """

    def __init__(self, device: str, space_key: str, statistic: str) -> None:
        self.device, self.space_key, self.statistic = device, space_key, statistic
        super().__init__(
            f"{device}'s lookup table holds no whole networks of {space_key} that tell the {statistic} of their runs; "
            "have the space measured there with `secateurs profile` (--again for an older table)"
        )


class MeasurementFailed(SecateursError):
    """A layer or network could not be measured on this device."""


class RuntimeUnavailable(SecateursError):
    """A runtime cannot be used here: its package is not installed, or it did not begin.

    Attributes:
        runtime: the runtime's name.
    """

    def __init__(self, runtime: str, reason: str) -> None:
        self.runtime = runtime
        super().__init__(f"runtime {runtime!r} is not available: {reason}")


class NoMeasuringProcess(SecateursError):
    """The process that measures did not start: no layer is to blame, and later it may.

    Attributes:
        runtime: the runtime's name.
    """

    def __init__(self, runtime: str, reason: str) -> None:
        self.runtime = runtime
        super().__init__(
            f"the process that measures with {runtime!r} {reason} before it was ready: free memory, or install "
            f"secateurs[{runtime}] anew; its last words are above"
        )


class ServiceError(SecateursError):
    """The service refused a request.

    Attributes:
        status: HTTP status.
        problem: the RFC 9457 problem document, as a dict.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status, self.problem = status, problem
        super().__init__(str(problem.get("detail") or problem.get("title") or f"HTTP {status}"))


class ServiceUnreachable(ServiceError):
    """The service did not answer."""

    def __init__(self, url: str, reason: str) -> None:
        detail = f"no answer from {url}: {reason}; is `secateurs up` running?"
        super().__init__(503, {"title": "unreachable", "detail": detail})
