"""How much of a network works: densities of weights and activations, and the multiply-adds that are left of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latency_profiler.cost import layer_flops
from latency_profiler.spaces.space import IMAGE
from workers.evaluation import BATCH, Images
from workers.networks import PlainNetwork


@dataclass(frozen=True, slots=True)
class Activity:
    """One layer, as shares of the dense one."""

    layer: str
    weights: float
    """Weights that are kept."""
    inputs: float
    """Numbers that the layer reads and that are not zero; 1 for the image."""
    flops: int
    """Multiply-adds of the dense layer."""

    @property
    def flops_share(self) -> float:
        """Multiply-adds of two numbers that are not zero: weights times inputs, as the paper's tables have it.

        It is exact where every input meets as many kept weights, or is zero as often, as every other.
        """
        return self.weights * self.inputs


@torch.inference_mode()
def measure(
    network: PlainNetwork, masks: Mapping[str, Tensor], images: Images, device: torch.device
) -> list[Activity]:  # fmt: skip
    """The activity of every layer with weights, on images."""
    network.eval()
    inputs = dict.fromkeys(masks, 0.0)

    def compute(i: int, x: Tensor) -> Tensor:
        if str(i) in inputs:
            inputs[str(i)] += float((x != 0).sum()) / x[0].numel() / len(images)
        return network.compute(i, x)

    for batch, _ in images.plain(BATCH, device):
        network.run(batch, compute)
    return list(_activities(network, masks, inputs))


def _activities(
    network: PlainNetwork, masks: Mapping[str, Tensor], inputs: Mapping[str, float]
) -> Iterator[Activity]:  # fmt: skip
    for name, mask in masks.items():
        node = network.nodes[int(name)]
        read = 1.0 if node.input == IMAGE else inputs[name]
        yield Activity(node.name, float(mask.sum()) / mask.numel(), read, layer_flops(node.layer))


def silent(activities: list[Activity]) -> list[str]:
    """Layers that read nothing but zeros."""
    return [activity.layer for activity in activities if activity.inputs == 0]
