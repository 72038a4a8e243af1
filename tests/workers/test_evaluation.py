from collections.abc import Iterator
from itertools import chain

import pytest
import torch

from latency_profiler.spaces.registry import get_space
from workers import evaluation
from workers.datasets import Data
from workers.evaluation import Images, Scorer, evaluate, recalibrate, refit
from workers.evolution import DIVERGED
from workers.networks import PlainNetwork
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


def test_fitting_the_classifier_changes_nothing_else_and_makes_up_for_a_bad_one(data: Data) -> None:
    plain = PlainNetwork(SPACE, SPACE.channels(SPACE.largest))
    recalibrate(plain, data.sub_training, 50, CPU)
    classifier = plain.linears[str(len(plain.nodes) - 1)]
    torch.nn.init.normal_(classifier.weight, std=0.1)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    bad = evaluate(plain, data.sub_training, CPU)
    refit(plain, data.sub_training, 50, CPU)
    good, after = evaluate(plain, data.sub_training, CPU), plain.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"linears.{len(plain.nodes) - 1}.{part}" for part in ("weight", "bias")}
    assert good.loss < 0.75 * bad.loss
    assert good.accuracy > 2 * bad.accuracy


def test_a_fitted_classifier_holds_to_its_weights_where_images_say_nothing(data: Data) -> None:
    plain = PlainNetwork(SPACE, SPACE.channels(SPACE.largest))
    recalibrate(plain, data.sub_training, 50, CPU)
    last = len(plain.nodes) - 1
    plain.convs[str(last - 2)].weight.data[0] = 0.0  # its channel is the same for all images
    plain.norms[str(last - 2)].running_mean[0] = 0.0
    before = plain.linears[str(last)].weight.clone()
    refit(plain, data.sub_training, 50, CPU)
    after = plain.linears[str(last)].weight
    assert torch.allclose(after[:, 0], before[:, 0], atol=1e-6)
    assert not torch.allclose(after[:, 1:], before[:, 1:], atol=1e-3)


def test_the_more_images_the_less_a_fitted_classifier_holds_to_its_weights(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Twice:
        def __len__(self) -> int:
            return 2 * len(data.sub_training)

        def plain(self, batch_size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return chain(data.sub_training.plain(batch_size, device), data.sub_training.plain(batch_size, device))

    def fitted(images: Images, pull: float) -> torch.Tensor:
        monkeypatch.setattr(evaluation, "PULL", pull)
        plain = PlainNetwork(SPACE, SPACE.channels(SPACE.largest))
        recalibrate(plain, data.sub_training, 50, CPU)
        refit(plain, images, 50, CPU)
        return plain.linears[str(len(plain.nodes) - 1)].weight

    start = PlainNetwork(SPACE, SPACE.channels(SPACE.largest)).linears[str(len(SPACE.units) - 1)].weight
    usual, strong = fitted(data.sub_training, 100.0), fitted(data.sub_training, 1e9)
    assert torch.allclose(strong, start, atol=1e-4)
    assert (usual - start).norm() > 100 * (strong - start).norm()
    assert torch.allclose(fitted(Twice(), 200.0), usual, atol=1e-3)
    assert (fitted(Twice(), 100.0) - start).norm() > 1.1 * (usual - start).norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_network_has_a_score_with_a_fitted_classifier(data: Data, bad: float) -> None:
    plain = PlainNetwork(SPACE, SPACE.channels(SPACE.largest))
    recalibrate(plain, data.sub_training, 50, CPU)
    plain.convs["0"].weight.data[0, 0, 0, 0] = bad
    refit(plain, data.sub_training, 50, CPU)
    assert evaluate(plain, data.sub_validation, CPU).loss == DIVERGED


def test_scores_with_fitted_classifiers_are_repeatable(data: Data) -> None:
    net = PruningNet(SPACE)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    scorer = Scorer(net, data, recalibration_images=64, classifier_images=100, seed=0, device=CPU)
    assert scorer.score(SPACE.largest) == scorer.score(SPACE.largest)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    kept = Scorer(net, data, recalibration_images=64, seed=0, device=CPU)
    assert scorer.score(SPACE.largest) != kept.score(SPACE.largest)


@pytest.mark.parametrize("drawn", [{"recalibration_images": 50}, {"recalibration_images": 0, "classifier_images": 50}])
def test_the_images_that_a_score_needs_are_drawn_by_the_seed(data: Data, drawn: dict[str, int]) -> None:
    net = PruningNet(SPACE)
    one, other = (Scorer(net, data, seed=seed, device=CPU, **drawn).score(SPACE.largest) for seed in (0, 1))
    assert one != other


def test_evaluation_equals_a_count_by_hand(data: Data) -> None:
    plain = PruningNet(SPACE).crop(SPACE.largest)
    images, labels = zip(*data.test.plain(30, CPU), strict=True)
    with torch.no_grad():
        logits = torch.cat([plain(batch) for batch in images])
    score = evaluate(plain, data.test, CPU, 25)
    assert score.accuracy == pytest.approx((logits.argmax(1) == torch.cat(labels)).double().mean().item())
    assert score.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.cat(labels)).item(), rel=1e-5)
