"""Residual networks: ResNet-50 (MetaPruning's `resnet`) and the CIFAR ResNets 20 and 56.

All outputs of a stage share one slot, so that shortcuts add equal widths. Every first block of a stage has a
projection, except where its input already has the stage's slot: two free widths cannot be joined by an identity
(the CIFAR ResNets were published with zero-padded shortcuts, which need growing widths).
"""

from latency_profiler.layers import Activation
from latency_profiler.spaces.space import IMAGE, Blueprint, Slot, Space

RELU = Activation.RELU


def draw_resnet50(b: Blueprint) -> Space:
    """20 genes: stem, outputs of stages 1 to 3, the 16 bottlenecks' middle widths; then stage 4's output."""
    stem = b.gene("stem", 64)
    outputs = [b.gene(f"stage{i + 1}", base) for i, base in enumerate((256, 512, 1024))]
    repeats, bases = (3, 4, 6, 3), (64, 128, 256, 512)
    middles = [[b.gene(f"middle{i + 1}.{k}", bases[i]) for k in range(repeats[i])] for i in range(4)]
    outputs.append(b.gene("stage4", 2048))

    if b.small:
        x = b.conv(IMAGE, stem, 3, activation=RELU, name="stem", encoding=(stem,))
    else:
        x = b.conv(IMAGE, stem, 7, stride=2, activation=RELU, name="stem", encoding=(stem,))
        x = b.max_pool(x, kernel=3, stride=2, padding=1, name="stem.pool")
    source = stem
    for i, target in enumerate(outputs):
        for k, middle in enumerate(middles[i]):
            stride = 2 if i > 0 and k == 0 else 1
            x = _bottleneck(b, x, (source, middle, target), stride, f"stage{i + 1}.{k}")
            source = target
    b.classifier(b.global_pool(x))
    return b.finish("resnet50", counts_relu=True, counts_global_pool=False)


def draw_resnet20(b: Blueprint) -> Space:
    """Three stages of 3 basic blocks."""
    return _basic(b, "resnet20", 3)


def draw_resnet56(b: Blueprint) -> Space:
    """Three stages of 9 basic blocks."""
    return _basic(b, "resnet56", 9)


def _basic(b: Blueprint, name: str, repeat: int) -> Space:
    """Genes: outputs of stages 1 and 2 (stage 1's is the stem's too), every block's middle width; then stage 3's."""
    outputs = [b.gene("stage1", 16), b.gene("stage2", 32)]
    middles = [[b.gene(f"middle{i + 1}.{k}", 16 << i) for k in range(repeat)] for i in range(3)]
    outputs.append(b.gene("stage3", 64))

    source = outputs[0]
    x = b.conv(IMAGE, source, 3, activation=RELU, name="stem", encoding=(source,))
    for i, target in enumerate(outputs):
        for k, middle in enumerate(middles[i]):
            stride = 2 if i > 0 and k == 0 else 1
            encoding, block = (middle, source, target), f"stage{i + 1}.{k}"
            skip = x
            if source is not target:
                skip = b.conv(x, target, 1, stride=stride, name=f"{block}.shortcut", encoding=encoding)
            x = b.conv(x, middle, 3, stride=stride, activation=RELU, name=f"{block}.conv1", encoding=encoding)
            x = b.conv(x, target, 3, activation=RELU, shortcut=skip, name=f"{block}.conv2", encoding=encoding)
            source = target
    b.classifier(b.global_pool(x))
    return b.finish(name, counts_relu=True, counts_global_pool=False)


def _bottleneck(b: Blueprint, x: int, slots: tuple[Slot, Slot, Slot], stride: int, name: str) -> int:
    """1×1, 3×3 (with the stride), 1×1, and the addition before the last activation."""
    source, middle, target = slots
    encoding, skip = (middle, source, target), x
    if source is not target:
        skip = b.conv(x, target, 1, stride=stride, name=f"{name}.shortcut", encoding=encoding)
    x = b.conv(x, middle, 1, activation=RELU, name=f"{name}.conv1", encoding=encoding)
    x = b.conv(x, middle, 3, stride=stride, activation=RELU, name=f"{name}.conv2", encoding=encoding)
    return b.conv(x, target, 1, activation=RELU, shortcut=skip, name=f"{name}.conv3", encoding=encoding)
