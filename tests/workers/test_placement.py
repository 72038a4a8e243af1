"""Where tensors live, as far as a machine without a GPU can tell."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latency_profiler.spaces.registry import get_space
from service.settings import Settings
from workers import datasets, training
from workers.datasets import Data
from workers.placement import NoSuchDevice, choose, home, place, precision
from workers.pruners.allowance import Allowance
from workers.pruners.interspace import InterspaceTrainer
from workers.pruners.interspace_settings import InterspaceSettings
from workers.training import PruningNetTrainer, ScratchTrainer, Trainer, TrainingSettings

SPACE = get_space("mobilenet_v1", 8, 0.125, 4, True)
SETTINGS = TrainingSettings(epochs=2, batch_size=32, learning_rate=0.05, clip_norm=10.0, normalise=True)
META = torch.device("meta")
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
MAKERS: dict[str, Callable[[Data, torch.device], Trainer]] = {
    "scratch": lambda data, device: ScratchTrainer(SPACE, SPACE.uniform(0.5), data, SETTINGS, 7, device),
    "pruning": lambda data, device: PruningNetTrainer(SPACE, data, SETTINGS, 7, None, device),
    "interspace": lambda data, device: InterspaceTrainer(
        SPACE, SPACE.uniform(0.5), data, SETTINGS, InterspaceSettings("random"),
        Allowance.at_rate(SPACE.nodes(SPACE.uniform(0.5)), 0.9), 7, device,
    ),
}  # fmt: skip


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("gpus", "asked", "rank", "processes", "device"),
    [
        (0, "auto", 0, 1, "cpu"), (0, "cpu", 1, 2, "cpu"), (2, "cpu", 0, 1, "cpu"),
        (1, "auto", 0, 1, "cuda:0"), (2, "auto", 1, 2, "cuda:1"), (1, "auto", 1, 2, "cpu"),
        (2, "cuda", 1, 2, "cuda:1"), (2, "cuda:1", 0, 1, "cuda:1"),
    ],
)  # fmt: skip
def test_every_process_gets_its_device(
    gpus: int, asked: str, rank: int, processes: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert choose(asked, rank, processes) == torch.device(device)
    assert torch.backends.cudnn.deterministic is device.startswith("cuda")


@pytest.mark.parametrize(
    ("gpus", "asked", "processes", "reason"),
    [(0, "cuda", 1, "torch sees 0"), (1, "cuda:1", 1, "torch sees 1"), (1, "cuda", 2, "2 training processes"),
     (4, "cuda:1", 2, "one each")],
)  # fmt: skip
def test_a_gpu_that_is_not_there_is_a_clear_error(
    gpus: int, asked: str, processes: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus)
    with pytest.raises(NoSuchDevice, match=reason) as caught:
        choose(asked, 0, processes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "cuda:x", "", "cpu:0"])
def test_a_wrong_name_of_a_device_is_refused_with_the_settings(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEURS_DEVICE", wrong)
    with pytest.raises(ValueError, match="device"):
        Settings()


@pytest.mark.parametrize(
    ("has", "size", "dtype"),
    [(True, 224, torch.bfloat16), (False, 224, torch.float32), (True, 65, torch.bfloat16), (True, 64, torch.float32)],
)
def test_a_gpu_computes_large_images_in_bfloat16_where_it_has_it(
    has: bool, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert precision(GPU, size) is dtype
    assert precision(CPU, size) is torch.float32


class OnHost:
    """Stands for a tensor of the host, and remembers how it was copied."""

    device = CPU
    pinned = False
    copied: tuple[Any, ...] = ()

    def pin_memory(self) -> "OnHost":
        self.pinned = True
        return self

    def to(self, *arguments: Any, **options: Any) -> "OnHost":
        self.copied = (arguments, options)
        return self


def test_a_gpu_takes_data_from_pinned_memory_while_the_host_goes_on() -> None:
    tensor: Any = OnHost()
    place(tensor, GPU)
    assert tensor.pinned
    assert tensor.copied == ((GPU,), {"non_blocking": True})
    plain: Any = OnHost()
    place(plain, CPU)
    assert not plain.pinned
    there = torch.zeros(2)
    assert place(there, CPU) is there


def test_a_dataset_lives_on_the_gpu_that_has_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 8000))
    assert home(1000, GPU) == GPU
    assert home(1001, GPU) == CPU
    assert home(1, CPU) == CPU


class Watch(TorchDispatchMode):
    """Sees every operation of a step: where its tensors are, what crosses from the host, what is read back."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[torch.Size] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        devices = {one.device.type for one in tensors}
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "item", "equal"), f"the host waits for {name}"
        if "meta" in devices:
            self.operations += 1
            assert devices == {"meta"}, f"{name} mixes {devices}"
        result = func(*args, **kwargs or {})
        if name == "_to_copy" and devices == {"cpu"} and result.device.type == "meta":
            self.copies.append(result.shape)
        return result


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_stays_on_its_device_and_the_host_never_waits(
    name: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's `meta` device, where tensors have no values: any read of one fails, and so does any mixing."""
    trainer = MAKERS[name](data, META)
    assert {tensor.device.type for tensor in trainer.state().values()} == {"meta"}
    trainer.network.train()
    batches = data.training if name == "scratch" else data.sub_training
    monkeypatch.setattr(batches, "_normalise", batches._normalise.on(META))  # as `prepare` does for its device
    placed: list[torch.Size] = []

    def counted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device == META:
            placed.append(tensor.shape)
        return place(tensor, device)

    for module in (datasets, training):
        monkeypatch.setattr(module, "place", counted)
    first = batches.training(32, 7, 0, META)
    trainer._update(*first, 0.05, 0)  # what is made once: powers of the update
    placed.clear()
    with Watch() as seen:
        images, labels = batches.training(32, 7, 1, META)
        trainer._update(images, labels, 0.05, 1)
    assert seen.operations > 100
    factors = [(2, 2)] if name == "pruning" else []
    assert placed == [(32, 8, 8, 3), (32,), *factors]
    assert seen.copies == placed


def test_data_for_a_device_is_normalised_there(data: Data) -> None:
    normalise = data.training._normalise.on(META)
    assert normalise(torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device=META)).device == META


def test_maps_are_channels_last_from_the_first_on(data: Data) -> None:
    images, _ = data.training.training(32, 7, 0, CPU)
    assert images.is_contiguous(memory_format=torch.channels_last)
    trainer = MAKERS["scratch"](data, CPU)
    formats = []
    for norm in trainer.network.norms.values():  # type: ignore[operator, union-attr]
        norm.register_forward_hook(
            lambda _, inputs, output: formats.append(
                all(one.is_contiguous(memory_format=torch.channels_last) for one in (*inputs, output))
            )
        )
    trainer.network(images)
    assert len(formats) > 20
    assert all(formats)


def test_gradients_that_are_not_finite_are_dropped_without_waiting(data: Data) -> None:
    trainer = MAKERS["scratch"](data, CPU)
    trainer.device = GPU  # the way of devices for which the host would have to wait
    for bad in (float("inf"), float("nan")):
        leaf = torch.zeros(3, requires_grad=True)
        leaf.grad = torch.tensor([1.0, bad, 2.0])
        trainer._clip([leaf])
        assert leaf.grad.tolist() == [0, 0, 0]
    leaf.grad = torch.tensor([0.0, 30.0, 40.0])
    trainer._clip([leaf])
    assert leaf.grad.tolist() == pytest.approx([0, 6, 8], rel=1e-4)
