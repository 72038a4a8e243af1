"""MobileNetV1 (MetaPruning's `mobilenetv1`): 13 genes, then the last block's output."""

from latency_profiler.layers import Activation
from latency_profiler.spaces.space import IMAGE, Blueprint, Space

BASES = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def draw(b: Blueprint) -> Space:
    """Block 0 is a 3×3 convolution, blocks 1 to 13 are a depthwise and a pointwise convolution."""
    slots = [b.gene(f"block{i}", base) for i, base in enumerate(BASES)]
    relu = Activation.RELU
    stem = 1 if b.small else STRIDES[0]
    x = b.conv(IMAGE, slots[0], 3, stride=stem, activation=relu, name="block0", encoding=(slots[0],))
    for i in range(1, len(BASES)):
        encoding = (slots[i - 1], slots[i])
        x = b.depthwise(x, stride=STRIDES[i], activation=relu, name=f"block{i}.depthwise", encoding=encoding)
        x = b.conv(x, slots[i], 1, activation=relu, name=f"block{i}.pointwise", encoding=encoding)
    b.classifier(b.global_pool(x))
    return b.finish("mobilenet_v1", counts_relu=False, counts_global_pool=True)
