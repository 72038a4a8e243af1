"""Recorded training steps: the policy everywhere, the bits where there is a GPU."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from latency_profiler.spaces.registry import get_space
from workers import replay
from workers.datasets import Data, prepare
from workers.replay import Replay
from workers.training import PruningNetTrainer, ScratchTrainer, Trainer, TrainingSettings

GPU = torch.device("cuda", 0)
SPACE = get_space("mobilenet_v1", 8, 0.125, 4, True)
SETTINGS = TrainingSettings(epochs=3, batch_size=32, learning_rate=0.05, clip_norm=10.0, normalise=True, warm_up=0.2)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Host:
    """Stands for torch's streams and graphs: a recording repeats the work on the inputs that it was made with."""

    device = torch.device("cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recordings = 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(replay.Replay, "_record", lambda made, rate: self._record(made, rate))

    def wait_stream(self, other: Any) -> None:
        """Nothing is to be waited for."""

    def _record(self, made: Any, rate: float) -> Any:
        self.recordings += 1

        class Again:
            def replay(self) -> None:
                made._work(rate, *made._inputs)

        return Again()


def test_every_call_does_the_work_once_with_its_own_rate_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    host, done = Host(monkeypatch), list[tuple[float, float]]()
    work = Replay(lambda rate, x: done.append((rate, float(x))), torch.device("cpu"))
    asked = [(0.1, 1.0), (0.2, 2.0), (0.2, 3.0), (0.2, 4.0), (0.1, 5.0), (0.1, 6.0), (0.1, 7.0)]
    for rate, x in asked:
        work(rate, torch.tensor(x))
    assert done == asked
    assert host.recordings == 2


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as `placement.choose` does
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (320, 8, 8, 3), dtype=torch.uint8, generator=random).numpy()
    labels = torch.randint(0, 4, (320,), generator=random).numpy()
    return prepare((pixels, labels), (pixels[:40], labels[:40]), 4, flip=True, validation=64, seed=0, device=GPU)


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.state().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@on_gpu
def test_recorded_steps_give_the_bits_of_plain_ones(there: Data) -> None:
    recorded, plain = (ScratchTrainer(SPACE, SPACE.uniform(0.5), there, SETTINGS, 7, GPU) for _ in range(2))
    plain._step = plain._work
    recorded.advance(lambda: False)
    plain.advance(lambda: False)
    assert recorded.history == plain.history
    assert _same(_state(recorded), _state(plain))


@on_gpu
@pytest.mark.parametrize("kind", ["scratch", "pruning"])
def test_training_on_a_gpu_is_reproducible_and_goes_on_from_a_checkpoint(kind: str, there: Data) -> None:
    def made() -> Trainer:
        if kind == "scratch":
            return ScratchTrainer(SPACE, SPACE.uniform(0.5), there, SETTINGS, 7, GPU)
        return PruningNetTrainer(SPACE, there, SETTINGS, 7, None, GPU)

    whole, stopped, resumed = made(), made(), made()
    whole.advance(lambda: False)
    stopped.advance(lambda: stopped.done >= 13)
    resumed.restore(_state(stopped), stopped.counters())
    resumed.advance(lambda: False)
    assert resumed.history == whole.history
    assert _same(_state(resumed), _state(whole))
