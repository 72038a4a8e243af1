"""LeNets as Han et al. prune them: LeNet-300-100, and LeNet-5 in the widths of Caffe's example, 20-50-500.

Both read grey images and have biases and no batch norm. At the published 28 pixels and 10 classes they have 266,610
and 431,080 parameters. Every hidden layer ends in a ReLU: Caffe's example has none behind its convolutions, but the
activations that Han et al. count there (82 % and 72 % are not zero) say that theirs had. LeNet-5's convolutions have no
padding; below 16 pixels, where nothing would be left of the map, they keep its size.
"""

from latency_profiler.layers import Activation
from latency_profiler.spaces.space import IMAGE, Blueprint, Space

RELU = Activation.RELU
KERNEL = 5
SMALLEST = 16
"""Pixels of which two 5×5 convolutions without padding and two poolings leave one."""


def draw_300_100(b: Blueprint) -> Space:
    """Three fully-connected layers."""
    b.image_channels = 1
    x = IMAGE
    for slot in (b.gene("fc1", 300), b.gene("fc2", 100)):
        x = b.linear(x, slot, activation=RELU, name=slot.name)
    b.classifier(x)
    return b.finish("lenet_300_100", counts_relu=True, counts_global_pool=False)


def draw_5(b: Blueprint) -> Space:
    """Two 5×5 convolutions, each with a 2×2 pooling, and two fully-connected layers."""
    b.image_channels = 1
    padding = KERNEL // 2 if b.image_size < SMALLEST else 0
    x = IMAGE
    for i, slot in enumerate((b.gene("conv1", 20), b.gene("conv2", 50)), start=1):
        x = b.conv(x, slot, KERNEL, padding=padding, activation=RELU, norm=False, name=slot.name)
        x = b.max_pool(x, kernel=2, stride=2, name=f"pool{i}")
    hidden = b.gene("fc1", 500)
    b.classifier(b.linear(x, hidden, activation=RELU, name=hidden.name))
    return b.finish("lenet_5", counts_relu=True, counts_global_pool=False)
