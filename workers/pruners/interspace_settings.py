"""The choices of interspace pruning, each with where its default is from.

[CODE] marks what the programs of a pruning method's own authors do; what the paper does with these methods in filter
bases beyond that is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from latency_profiler.errors import InvalidInput
from workers.pruners.dynamic import Densities, cosine
from workers.pruners.filter_bases import Bases

Method = Literal["random", "snip", "grasp", "synflow", "magnitude", "set", "rigl"]
DYNAMIC = ("set", "rigl")


@dataclass(frozen=True, slots=True)
class InterspaceSettings:
    """What is pruned, in which bases, by which method."""

    method: Method = "synflow"
    """No source: chosen here, as the method that needs no data and does not lose layers."""
    bases: Bases = field(default_factory=Bases)
    """Filter bases; `Bases(sharing="spatial")` is standard pruning."""
    snip_images: int = 100
    """Images of SNIP's one batch [CODE]."""
    snip_second_start: bool = True
    """Whether a network pruned by SNIP is trained from other random weights than those it was scored with [CODE]."""
    grasp_temperature: float = 200.0
    """What logits are divided by in GraSP's loss [CODE]."""
    grasp_images: int = 10
    """Images of each class in GraSP's batch [CODE]."""
    grasp_xavier: bool = True
    """Whether GraSP scores with Xavier-normal linear layers [CODE]."""
    synflow_rounds: int = 100
    """Rounds of SynFlow, which keep (1 - p)^(t / T) after round t [CODE]."""
    lottery_share: float = 0.2
    """Share of the remaining entries that a level of magnitude pruning removes [CODE open_lth]."""
    lottery_rewinds: bool | None = None
    """Whether a level begins from the first values of coefficients, bases and norms (lottery ticket [CODE open_lth]);
    otherwise it goes on from the trained ones (classical pruning). None: unless the first values are trained ones."""
    lottery_keeps_classifier: bool = True
    """Whether the output layer is the last to be pruned by magnitude [CODE open_lth leaves it out]."""
    lottery_basis_norms: bool = False
    """Whether magnitudes of coefficients count times the norm of their basis filter. No source: chosen here."""
    set_share: float = 0.3
    """Share of a layer's entries that SET exchanges after every epoch, zeta [CODE]."""
    set_densities: Densities = "er"
    """How SET's entries are spread over layers [CODE: Erdos-Renyi; the allowance stands for its epsilon]."""
    rigl_share: float = 0.3
    """Share of a layer's entries that RigL exchanges [CODE]."""
    rigl_annealed: bool = False
    """Whether that share falls along a cosine to zero at the last exchange [CODE: an option]."""
    rigl_every: int = 100
    """Iterations between RigL's exchanges [CODE]."""
    rigl_until: int = 25_000
    """Iteration of RigL's last exchange [CODE]; at the latest one interval before the end of training."""
    rigl_densities: Densities = "erk"
    """How RigL's entries are spread over layers [CODE]."""

    def __post_init__(self) -> None:
        counts = (self.snip_images, self.grasp_images, self.synflow_rounds, self.rigl_every, self.rigl_until)
        shares = (self.lottery_share, self.set_share, self.rigl_share)
        if self.method not in get_args(Method):
            raise InvalidInput(f"unknown pruning method {self.method!r}; there are: {', '.join(get_args(Method))}")
        if min(counts) < 1 or self.grasp_temperature <= 0:
            raise InvalidInput("images, rounds, iterations and temperature must be positive")
        if not all(0 < share < 1 for share in shares):
            raise InvalidInput("shares of entries that are removed or exchanged must lie between 0 and 1")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "InterspaceSettings":
        """From a request's fields, `bases` a mapping among them; those that are no setting of this are left out."""
        given = {name: fields[name] for name in cls.__slots__ if fields.get(name) is not None}
        return cls(**{**given, "bases": Bases(**given.get("bases", {}))})

    def levels(self, share: float, trained: bool) -> tuple[float, ...]:
        """Shares of entries that are kept in one training after another; 0 is as little as is allowed.

        Args:
            share: what may be kept in the end.
            trained: whether the network is trained already, so that magnitudes can be compared at once.
        """
        if self.method != "magnitude":
            return (0.0,)
        found = [] if trained else [1.0]
        kept = 1.0 - self.lottery_share
        while kept > share:
            found.append(kept)
            kept *= 1.0 - self.lottery_share
        return (*found, 0.0)

    def rewinds(self, trained: bool) -> bool:
        """Whether levels begin from the first values, where these are trained or not."""
        return not trained if self.lottery_rewinds is None else self.lottery_rewinds

    def rounds_at_start(self, trained: bool) -> int:
        """Rounds in which the network is pruned before its first training."""
        if self.method == "synflow":
            return self.synflow_rounds
        return 0 if self.method == "magnitude" and not trained else 1

    def rigl_last(self, total: int) -> int:
        """Iteration of RigL's last exchange in a training of so many."""
        return min(self.rigl_until, total - self.rigl_every)

    def rigl_share_at(self, iteration: int, total: int) -> float:
        """The share of a layer's entries that RigL exchanges at an iteration, up to the last one of a training."""
        return cosine(self.rigl_share, iteration, self.rigl_last(total)) if self.rigl_annealed else self.rigl_share
