"""The plain method that speeds are compared with computes what ours does."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from latency_profiler.spaces.registry import get_space
from workers.pruning_net import PruningNet


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet20"])
def test_same_weights_give_the_same_logits_in_training_and_in_evaluation(name: str, reference: ModuleType) -> None:
    space = get_space(name, 16, 0.25, 4, True)
    net = PruningNet(space, seed=1).double()
    theirs = reference.Reference(net).double()
    encoding = tuple(torch.randint(3, 31, (len(space.genes),), generator=torch.Generator().manual_seed(5)).tolist())
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = {name: units.double() for name, units in net.hidden(encoding).items()}
    logits = net.train()(images, encoding, net.generate(encoding, hidden=hidden))
    torch.set_default_dtype(torch.float64)
    try:
        expected = theirs.train()(images, encoding)
        assert torch.allclose(logits, expected, atol=1e-5)
        assert torch.allclose(net.eval()(images, encoding), theirs.eval()(images, encoding), atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
