"""Spaces against the published networks, and their encodings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_profiler.cost import authors_flops, flops, parameters
from latency_profiler.errors import InvalidChannels, InvalidEncoding, InvalidInput, UnknownSpace
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.spaces.registry import SPACES, get_space
from latency_profiler.spaces.space import CHOICES, Space

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden.json").read_text())
"""Channels and counts of published networks: facts of MetaPruning's model files and of the standard MobileNetV2."""
PUBLISHED = [row for row in GOLDEN if row["space"] in SPACES]
STANDARD = [row for row in GOLDEN if row["space"] == "mobilenet_v2_standard"]


def named(row: dict[str, Any]) -> str:
    return str(row["name"])


def test_the_fixture_holds_every_family() -> None:
    assert {row["space"] for row in PUBLISHED} == {"mobilenet_v1", "mobilenet_v2", "resnet50"}
    assert len(PUBLISHED) == 19
    assert len(STANDARD) == 5


@pytest.mark.parametrize("row", PUBLISHED, ids=named)
def test_published_network_is_reproduced_to_the_integer(row: dict[str, Any]) -> None:
    space = get_space(row["space"])
    layers = space.layers(row["channels"])
    assert flops(layers) == row["flops"]
    assert parameters(layers) == row["parameters"]
    assert authors_flops(space, row["channels"]) == row["authors_flops"]


@pytest.mark.parametrize("row", [row for row in PUBLISHED if "encoding" in row], ids=named)
def test_published_encoding_gives_the_published_channels(row: dict[str, Any]) -> None:
    space = get_space(row["space"])
    assert space.channels(row["encoding"]) == tuple(row["channels"])


def test_no_two_widths_share_a_key() -> None:
    keys = [get_space("mobilenet_v2", 32, width, 10).key for width in (0.5, 0.3333333, 1 / 3, 0.333333)]
    assert keys[0] == "mobilenet_v2@32x0.5/10"
    assert keys[3] == "mobilenet_v2@32x0.333333/10"
    assert len(set(keys)) == 4


@pytest.mark.parametrize("row", [row for row in PUBLISHED if "width" in row], ids=named)
def test_width_multiplier_gives_the_published_uniform_network(row: dict[str, Any]) -> None:
    space = get_space(row["space"], width=row["width"])
    assert space.channels(space.largest) == tuple(row["channels"])
    assert get_space(row["space"]).uniform(row["width"]) == tuple(row["channels"])


@pytest.mark.parametrize("row", STANDARD, ids=named)
def test_layer_arithmetic_counts_the_standard_mobilenet_v2(row: dict[str, Any]) -> None:
    """A network outside of all spaces, its layers written down from the paper's table 2."""
    layers = standard_mobilenet_v2(row["channels"])
    assert flops(layers) == row["flops"]
    assert parameters(layers) == row["parameters"]


def standard_mobilenet_v2(widths: Sequence[int]) -> list[Layer]:
    """`widths`: the stem's, each bottleneck's and the last convolution's output."""
    strides = [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    layers = [conv(3, widths[0], 224, kernel=3, stride=2)]
    size = 112
    for i, stride in enumerate(strides):
        c_in, c_out = widths[i], widths[i + 1]
        middle = 6 * c_in if i else c_in
        if i:
            layers.append(conv(c_in, middle, size))
        layers.append(conv(middle, middle, size, op=Op.DEPTHWISE, kernel=3, stride=stride))
        size //= stride
        layers.append(conv(middle, c_out, size))
    layers.append(conv(widths[-2], widths[-1], size))
    return [*layers, Layer(Op.LINEAR, widths[-1], 1000, 1)]


def conv(c_in: int, c_out: int, size: int, *, op: Op = Op.CONV, kernel: int = 1, stride: int = 1) -> Layer:
    return Layer(op, c_in, c_out, size, kernel, stride, kernel // 2, Activation.RELU6, norm=True)


spaces = st.sampled_from(
    [get_space(name, size, width, 10, last) for name in SPACES for size in (8, 32, 224) for width in (0.25, 1.0)
     for last in (False, True)]
)  # fmt: skip


@st.composite
def structures(draw: st.DrawFn) -> tuple[Space, tuple[int, ...]]:
    space = draw(spaces)
    genes = st.integers(0, CHOICES - 1)
    return space, tuple(draw(st.lists(genes, min_size=len(space.genes), max_size=len(space.genes))))


@given(structures())
def test_channels_survive_the_round_trip_through_the_canonical_encoding(drawn: tuple[Space, tuple[int, ...]]) -> None:
    space, encoding = drawn
    channels = space.channels(encoding)
    canonical = space.encoding(channels)
    assert space.channels(canonical) == channels
    assert all(least <= gene for least, gene in zip(canonical, encoding, strict=True))
    assert space.encoding(space.channels(canonical)) == canonical


@given(structures())
def test_layers_fit_together(drawn: tuple[Space, tuple[int, ...]]) -> None:
    """Every layer reads what the node before it gives, and shortcuts add equal shapes."""
    space, encoding = drawn
    nodes = space.nodes(space.channels(encoding))
    assert [node.layer for node in nodes] == list(space.layers(space.channels(encoding)))
    assert nodes[-1].layer.c_out == space.classes
    for index, node in enumerate(nodes):
        assert node.input < index
        before = nodes[node.input].layer if node.input >= 0 else None
        image = space.image_channels, space.image_size
        given_channels, given_size = (before.c_out, before.out_size) if before else image
        if node.layer.op is Op.LINEAR:
            assert node.layer.c_in == given_channels * given_size**2
        else:
            assert (node.layer.c_in, node.layer.size) == (given_channels, given_size)
        if node.shortcut is not None:
            added = nodes[node.shortcut].layer
            assert (added.c_out, added.out_size) == (node.layer.c_out, node.layer.out_size)
        assert node.layer.residual == (node.shortcut is not None)


def test_equal_widths_are_one_structure() -> None:
    space = get_space("resnet20", 32, 1.0, 10)
    one, other = (1, *space.smallest[1:]), (2, *space.smallest[1:])
    assert space.choices[0][:3] == (1, 2, 2), "16 channels have fewer than 31 widths"
    assert space.digest(space.channels(one)) == space.digest(space.channels(other))
    assert space.encoding(space.channels(other)) == one


def test_digest_tells_spaces_and_widths_apart() -> None:
    space = get_space("resnet20", 32, 1.0, 10)
    digests = {space.digest(space.channels(space.largest)), space.digest(space.channels(space.smallest))}
    digests.add(get_space("resnet20", 32, 1.0, 11).digest(space.channels(space.largest)))
    assert len(digests) == 3


def test_small_images_use_the_cifar_convention() -> None:
    """Stride-1 stem and no pooling behind it, so that resnet50 still has 32 pixels in its first stage."""
    small, large = get_space("resnet50", 32), get_space("resnet50", 224)
    stem = small.units[0].layer(small.channels(small.largest))
    assert (stem.kernel, stem.stride, stem.out_size) == (3, 1, 32)
    assert small.units[1].op is Op.CONV
    stem = large.units[0].layer(large.channels(large.largest))
    assert (stem.kernel, stem.stride, stem.out_size) == (7, 2, 112)
    assert large.units[1].op is Op.MAX_POOL


def test_published_resnets_for_cifar() -> None:
    """ResNet-20 as in He et al. 2016, section 4.2, with projections: 0.27 M weights of which 2,560 are projections."""
    space = get_space("resnet20", 32, 1.0, 10)
    layers = space.layers(space.channels(space.largest))
    weights = 3 * 9 * 16 + 6 * 16 * 16 * 9 + (16 + 32) * 32 * 9 + 4 * 32 * 32 * 9 + (32 + 64) * 64 * 9 + 4 * 64 * 64 * 9
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert parameters(layers) == weights + norms + projections + 650


def test_published_lenets() -> None:
    """Han et al., table 1: 267 K and 431 K parameters on 28×28 grey images; the layers' weights as in their tables."""
    three, five = get_space("lenet_300_100", 28, 1.0, 10), get_space("lenet_5", 28, 1.0, 10)
    of_three, of_five = (space.layers(space.channels(space.largest)) for space in (three, five))
    assert parameters(of_three) == 266_610 == 784 * 300 + 300 * 100 + 100 * 10 + 410
    assert parameters(of_five) == 431_080 == 25 * 20 + 25 * 20 * 50 + 16 * 50 * 500 + 500 * 10 + 580
    assert [flops([layer]) for layer in of_three] == [235_200, 30_000, 1_000]
    assert [layer.out_size for layer in of_five] == [24, 12, 8, 4, 1, 1]
    assert [flops([layer]) for layer in of_five] == [24**2 * 500, 0, 8**2 * 25_000, 0, 400_000, 5_000]
    elements, windows = 24**2 * 20 + 8**2 * 50 + 500, 4 * (12**2 * 20 + 4**2 * 50)
    counted = flops(of_five) + (elements + 10) + elements + windows  # biases, ReLUs, poolings
    assert authors_flops(five, five.channels(five.largest)) == counted


def test_lenets_scale_with_the_image() -> None:
    """Unpadded as far as they go: 16 pixels leave one; 8 are padded to leave two."""
    for size, left in ((8, 2), (15, 3), (16, 1), (28, 4), (32, 5)):
        space = get_space("lenet_5", size, 1.0, 10)
        layers = space.layers(space.channels(space.largest))
        assert layers[4].c_in == 50 * left**2
    assert get_space("lenet_300_100", 8).layers((300, 100))[0].c_in == 64


def test_spaces_without_batch_norm_say_so() -> None:
    assert {name for name in SPACES if not get_space(name, 32).normed} == {"lenet_300_100", "lenet_5"}
    assert get_space("vgg16", 224).normed, "its hidden linear layers are fixed"


def test_wrong_input_is_explained() -> None:
    space = get_space("mobilenet_v1", 32, 0.5, 10)
    with pytest.raises(UnknownSpace, match=r"known spaces: .*mobilenet_v1"):
        get_space("alexnet")
    with pytest.raises(InvalidInput, match="image size is 4; it must be 8 to 512"):
        get_space("vgg16", 4)
    with pytest.raises(InvalidEncoding, match="has 13 genes, the encoding has 2"):
        space.channels((1, 2))
    with pytest.raises(InvalidEncoding, match="'block12' is 31; it must be 0 to 30"):
        space.channels((*space.largest[:-1], 31))
    with pytest.raises(InvalidChannels, match="'block0' cannot be 17"):
        space.encoding((17, *space.channels(space.largest)[1:]))
    with pytest.raises(InvalidChannels, match="is 0; a width must be 1 to 65536"):
        space.layers((0, *space.channels(space.largest)[1:]))


@given(structures())
def test_layers_survive_json(drawn: tuple[Space, tuple[int, ...]]) -> None:
    space, encoding = drawn
    for layer in set(space.layers(space.channels(encoding))):
        assert Layer.from_json(json.loads(json.dumps(layer.to_json()))) == layer
