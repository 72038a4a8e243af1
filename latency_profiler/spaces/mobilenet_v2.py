"""MobileNetV2 (MetaPruning's `mobilenetv2`, a 1.4× network): 8 stage genes, 17 middle genes, then the last 1×1 output.

Unlike the standard MobileNetV2 the first bottleneck has an expansion convolution, with its input's base width.
"""

from latency_profiler.layers import Activation
from latency_profiler.spaces.space import IMAGE, Blueprint, Space

STAGES = (44, 22, 33, 44, 88, 132, 224, 448)
REPEATS = (1, 1, 2, 3, 4, 3, 3, 1)
STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
EXPANSION = 6
LAST = 1280


def draw(b: Blueprint) -> Space:
    """Stage 0 is a 3×3 convolution; the others are bottlenecks: expand, depthwise, project."""
    stages = [b.gene(f"stage{i}", base) for i, base in enumerate(STAGES)]
    inputs = [i if k else i - 1 for i, repeat in enumerate(REPEATS) for k in range(repeat)][1:]
    bases = [STAGES[i] * (EXPANSION if n else 1) for n, i in enumerate(inputs)]
    middles = [b.gene(f"middle{n}", base) for n, base in enumerate(bases)]
    last = b.gene("last", LAST)
    relu6 = Activation.RELU6

    stem = 1 if b.small else STRIDES[0]
    x = b.conv(IMAGE, stages[0], 3, stride=stem, activation=relu6, name="stem", encoding=(stages[0],))
    n = 0
    for i in range(1, len(STAGES)):
        for k in range(REPEATS[i]):
            source, middle, target, name = stages[inputs[n]], middles[n], stages[i], f"bottleneck{n}"
            encoding, shortcut = (middle, source, target), x if k else None
            x = b.conv(x, middle, 1, activation=relu6, name=f"{name}.expand", encoding=encoding)
            stride = 1 if k else STRIDES[i]
            x = b.depthwise(x, stride=stride, activation=relu6, name=f"{name}.depthwise", encoding=encoding)
            x = b.conv(x, target, 1, shortcut=shortcut, name=f"{name}.project", encoding=encoding)
            n += 1
    feeds = (stages[-1], last) if b.free_last else (stages[-1],)
    x = b.conv(x, last, 1, activation=relu6, name="last", encoding=feeds, norm_slot=last if b.free_last else stages[-1])
    b.classifier(b.global_pool(x))
    return b.finish("mobilenet_v2", counts_relu=False, counts_global_pool=True)
