"""What a pruning method says of every mask that it judged."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Judgement:
    """One mask or structure on the way, judged on the sub-validation set."""

    round: int
    """Which pruning iteration it ended; 0 is the dense network."""
    channels: tuple[int, ...]
    """Real widths of the network, one per slot."""
    kept: int
    """Prunable parameters that are not zero."""
    prunable: int
    """Prunable parameters of the dense network."""
    sparse_flops: int
    """Multiply-adds of kept weights; the dense count for structured methods."""
    accuracy: float
    loss: float
    note: str = ""
    """What was done, for the reader: qualities, method, sharing."""
