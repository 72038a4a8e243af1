"""VGG-16 with batch norm: 12 genes, then the last convolution's output.

At 224 pixels it has the published classifier (two hidden layers of 4096); small images get one linear layer. A 2×2
pooling is left out where the map is a single pixel already.
"""

from latency_profiler.layers import Activation
from latency_profiler.spaces.space import IMAGE, Blueprint, Slot, Space

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 4096


def draw(b: Blueprint) -> Space:
    """Five stages of 3×3 convolutions, each followed by a pooling."""
    x, source = IMAGE, None
    for i, stage in enumerate(STAGES):
        for k, base in enumerate(stage):
            slot = b.gene(f"conv{i + 1}.{k + 1}", base)
            encoding = (slot,) if source is None else (source, slot)
            x = b.conv(x, slot, 3, activation=Activation.RELU, name=slot.name, encoding=encoding)
            source = slot
        if b.size(x) > 1:
            x = b.max_pool(x, kernel=2, stride=2, name=f"pool{i + 1}")
    if not b.small:
        for name in ("hidden1", "hidden2"):
            x = b.linear(x, Slot(name, HIDDEN, None), activation=Activation.RELU, name=name)
    elif b.size(x) > 1:
        x = b.global_pool(x)
    b.classifier(x)
    return b.finish("vgg16", counts_relu=True, counts_global_pool=False)
