"""What a runtime is, and how one is found.

A runtime turns layers and networks into subjects that `timing` can run. Runtimes are entry points of the group
`secateurs.runtimes`, so that another package can add one: a callable that takes `Settings` and returns a `Runtime`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from latency_profiler.errors import InvalidInput, RuntimeUnavailable
from latency_profiler.layers import Layer, Node
from latency_profiler.timing import Subject

GROUP = "secateurs.runtimes"


@dataclass(frozen=True, slots=True)
class Settings:
    """How a runtime computes: part of a device's identity.

    Raises:
        InvalidInput: a number below 1, or a dtype that is not measured today.
    """

    threads: int = 1
    batch: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("batch", self.batch)):
            if value < 1:
                raise InvalidInput(f"{name} is {value}; it must be at least 1")
        if self.dtype != "float32":
            raise InvalidInput(f"dtype is {self.dtype!r}; layers are measured in 'float32' only")


class Runtime(Protocol):
    """One way to execute layers on this machine."""

    @property
    def name(self) -> str:
        """As in the entry point."""
        ...

    @property
    def version(self) -> str:
        """Of the package that computes."""
        ...

    @property
    def settings(self) -> Settings:
        """How it computes."""
        ...

    def load_layer(self, layer: Layer) -> Subject:
        """One layer with random weights, ready to run."""
        ...

    def load_network(self, nodes: Sequence[Node]) -> Subject:
        """A whole network with random weights, ready to run."""
        ...

    def empty_run(self) -> Subject:
        """A call with nothing to compute: what every layer's run costs beyond the layer, and a network's run once."""
        ...


def open_runtime(name: str, settings: Settings) -> Runtime:
    """The runtime of this name.

    Raises:
        InvalidInput: no runtime has this name.
        RuntimeUnavailable: its package is not installed.
    """
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise InvalidInput(f"unknown runtime {name!r}; known runtimes: {', '.join(sorted(known))}")
    return _load(known[name])(settings)


def _load(point: EntryPoint) -> Callable[[Settings], Runtime]:
    try:
        return cast("Callable[[Settings], Runtime]", point.load())
    except ImportError as error:
        raise RuntimeUnavailable(point.name, str(error)) from error
