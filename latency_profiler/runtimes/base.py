"""What a runtime is, and how one is found.

A runtime turns layers and networks into subjects that `timing` can run. Runtimes are entry points of the group
`secateurs.runtimes`, so that another package can add one: a callable that takes `Settings` and returns a `Runtime`.
README's "Write your own runtime" is a whole one, for a board that is reached over ssh.

What a runtime owes:
- a layer is the fused unit that is deployed: graph optimisation is on, weights are packed before the first run;
- `settings` are obeyed: exactly so many threads, so many images per run. Which cores the threads run on is left to
  the operating system, since a core that is chosen in advance may be the busy one (`taskset` chooses);
- inputs lie ready: a run moves nothing but what the computation itself moves;
- loading happens in `load_layer` and `load_network`, which may be slow and may fail: the reason is stored as data;
- weights and inputs are `tensors.random_weights` and `random_inputs` of seed 0, so that all runtimes compute the same
  numbers, which tests compare (`Loaded.output`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from latency_profiler.errors import InvalidInput, RuntimeUnavailable, SecateursError
from latency_profiler.layers import Layer, Node
from latency_profiler.tensors import Array
from latency_profiler.timing import Stopwatch, Subject

GROUP = "secateurs.runtimes"
DTYPES = ("float32", "bfloat16", "float16", "int8")
"""What activations and weights may be; a runtime says which of them it computes in."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a runtime computes: part of a device's identity.

    Raises:
        InvalidInput: a number below 1, or a dtype that no runtime has.
    """

    threads: int = 1
    batch: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("batch", self.batch)):
            if value < 1:
                raise InvalidInput(f"{name} is {value}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise InvalidInput(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class Loaded(Stopwatch):
    """A subject whose result can be looked at: `output` runs once and gives what `tensors.output_shape` says."""

    output: Callable[[], Array] = field(kw_only=True)


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

    @property
    def framed(self) -> bool:
        """Whether layers are measured between others (`frames`): where a lone one pays for an order of channels."""
        ...

    @property
    def dtypes(self) -> Sequence[str]:
        """Those of `DTYPES` that it can compute in."""
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


def names() -> list[str]:
    """All runtimes that are known here, whether or not their packages are installed."""
    return sorted(_points())


def open_runtime(name: str, settings: Settings) -> Runtime:
    """The runtime of this name.

    Raises:
        InvalidInput: no runtime has this name, or it does not compute in this dtype.
        RuntimeUnavailable: its package is not installed, or it cannot begin.
    """
    known = _points()
    if name not in known:
        raise InvalidInput(f"unknown runtime {name!r}; known runtimes: {', '.join(sorted(known))}")
    make = _load(known[name])
    try:
        runtime = make(settings)
    except SecateursError:
        raise
    except Exception as error:  # a runtime may be anybody's
        raise RuntimeUnavailable(name, f"{type(error).__name__}: {error}") from error
    if settings.dtype not in runtime.dtypes:
        raise InvalidInput(f"runtime {name!r} computes in {', '.join(runtime.dtypes)}, not in {settings.dtype}")
    return runtime


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> Callable[[Settings], Runtime]:
    try:
        return cast("Callable[[Settings], Runtime]", point.load())
    except ImportError as error:
        how = f"install it with: pip install 'secateurs[{point.name}]'"
        raise RuntimeUnavailable(point.name, f"{error}; {how}") from error
