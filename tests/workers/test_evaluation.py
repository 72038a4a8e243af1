import pytest
import torch

from latency_profiler.spaces.registry import get_space
from workers.datasets import Data
from workers.evaluation import Scorer, evaluate, recalibrate
from workers.pruning_net import PruningNet

SPACE = get_space("mobilenet_v1", 8, 0.125, 4, True)
CPU = torch.device("cpu")


def test_recalibration_is_the_mean_of_batch_means_and_idempotent(data: Data) -> None:
    plain = PruningNet(SPACE).crop(SPACE.largest)
    recalibrate(plain, data.sub_training, 50, CPU)
    stem = plain.norms["0"]
    maps = [plain.convs["0"](images) for images, _ in data.sub_training.plain(50, CPU)]
    assert len(maps) == 4
    assert torch.allclose(stem.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0), atol=1e-5)
    variance = torch.stack([m.transpose(0, 1).flatten(1).var(1) for m in maps]).mean(0)
    assert torch.allclose(stem.running_var, variance, rtol=1e-4)
    first = [tensor.clone() for tensor in plain.buffers()]
    recalibrate(plain, data.sub_training, 50, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first, plain.buffers(), strict=True))


def test_scoring_is_repeatable_and_leaves_the_pruning_net_alone(data: Data) -> None:
    net = PruningNet(SPACE)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    scorer = Scorer(net, data, recalibration_images=64, seed=0, device=CPU)
    first, other, again = scorer.score(SPACE.largest), scorer.score(SPACE.smallest), scorer.score(SPACE.largest)
    assert first == again != other
    assert 0 <= first.accuracy <= 1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_without_recalibration_the_trained_statistics_count(data: Data) -> None:
    net = PruningNet(SPACE)
    images, _ = next(data.sub_training.plain(50, CPU))
    net.train()(images, SPACE.largest)
    trained = net.crop(SPACE.largest)
    score = Scorer(net, data, recalibration_images=0, seed=0, device=CPU).score(SPACE.largest)
    assert score == evaluate(trained, data.sub_validation, CPU)
    assert score != Scorer(net, data, recalibration_images=64, seed=0, device=CPU).score(SPACE.largest)


def test_evaluation_equals_a_count_by_hand(data: Data) -> None:
    plain = PruningNet(SPACE).crop(SPACE.largest)
    images, labels = zip(*data.test.plain(30, CPU), strict=True)
    with torch.no_grad():
        logits = torch.cat([plain(batch) for batch in images])
    score = evaluate(plain, data.test, CPU, 25)
    assert score.accuracy == pytest.approx((logits.argmax(1) == torch.cat(labels)).double().mean().item())
    assert score.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.cat(labels)).item(), rel=1e-5)
