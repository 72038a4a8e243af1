"""Two processes under torchrun train as one does. This file is also what each of the two runs."""

import copy
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from latency_profiler.durable import place
from latency_profiler.errors import InvalidInput
from latency_profiler.spaces.registry import get_space
from workers import checkpoints, parallel
from workers.datasets import Data, prepare
from workers.parallel import ALONE, Ranks, Team
from workers.pruners.allowance import Allowance
from workers.pruners.filter_bases import Bases
from workers.pruners.interspace import InterspaceTrainer
from workers.pruners.interspace_settings import InterspaceSettings
from workers.training import PruningNetTrainer, ScratchTrainer, Trainer, TrainingSettings

SPACE = get_space("resnet20", 8, 0.25, 4, True)
DEEP = get_space("mobilenet_v1", 8, 0.25, 4, True)
SETTINGS = TrainingSettings(epochs=3, batch_size=33, learning_rate=0.002, clip_norm=10.0, normalise=True)
CPU = torch.device("cpu")
INTERSPACE = InterspaceSettings("rigl", Bases("medium", initialisation="orthonormal"), rigl_every=4)
RATE = Allowance.at_rate(SPACE.nodes(SPACE.uniform(0.5)), 0.5)
TRAINERS: dict[str, Callable[[Data, Team], Trainer]] = {
    "scratch": lambda data, team: ScratchTrainer(SPACE, SPACE.uniform(0.5), data, SETTINGS, 7, CPU, team),
    "pruning": lambda data, team: PruningNetTrainer(SPACE, data, SETTINGS, 7, None, CPU, team),
    "interspace": lambda data, team: InterspaceTrainer(
        SPACE, SPACE.uniform(0.5), data, SETTINGS, INTERSPACE, RATE, 7, CPU, team
    ),
}
DEEP_TRAINERS: dict[str, Callable[[Data, Team], Trainer]] = {
    "scratch": lambda data, team: ScratchTrainer(DEEP, DEEP.uniform(0.5), data, SETTINGS, 7, CPU, team),
    "pruning": lambda data, team: PruningNetTrainer(DEEP, data, SETTINGS, 7, None, CPU, team),
}
"""27 layers of few channels, whose last batch norms see one pixel of an image: rounding alone changes their curve (in
float64 too, though their gradients agree to 13 digits), so only their first step is compared; at half of these widths
it changes that by 5 %."""
PAUSES = (4, 2)
"""After so many iterations process 0 pauses: in the first epoch, and at its end."""
PAUSED = {"scratch": [4, 6], "pruning": [4, 6], "interspace": [3, 5]}
"""Iterations of training that are done then; interspace pruning spends one on its first mask."""


def images() -> Data:
    """240 images of 8x8 whose brightness tells their class, of 4 classes."""
    random = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 60)
    pixels = np.clip(random.normal(40 + 50 * labels[:, None, None, None], 20, (240, 8, 8, 3)), 0, 255).astype(np.uint8)
    return prepare((pixels, labels), (pixels[:80], labels[:80]), 4, flip=True, validation=40, seed=0)


def after(steps: int) -> Callable[[], bool]:
    counter = itertools.count(1)
    return lambda: next(counter) >= steps


def story(trainer: Trainer, team: Team, folder: Path | None = None) -> dict[str, Any]:
    """Train with pauses; what became of it, and the checkpoint of the first pause."""
    told: dict[str, Any] = {"paused": []}
    for steps in PAUSES:
        trainer.advance(after(steps) if team.rank == 0 else lambda: False)
        told["paused"].append(trainer.done)
        if folder is not None and "saved" not in told:
            told["saved"] = checkpoints.save(folder, trainer.state()), copy.deepcopy(trainer.counters())
    trainer.advance(lambda: False)
    return told | end(trainer)


def end(trainer: Trainer) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, tensor in trainer.state().items():
        if name != "sums":
            digest.update(tensor.contiguous().numpy().tobytes())
    norms = {name: float(tensor.double().norm()) for name, tensor in trainer.state().items()}
    return {"history": trainer.history, "digest": digest.hexdigest(), "norms": norms}


def member(folder: Path) -> None:
    """One of the two processes; `folder` has the stories of a single one."""
    torch.set_num_threads(1)
    team, data, found = Ranks(CPU, timeout=60.0), images(), {}
    single = json.loads((folder / "single").read_text())
    for name, make in TRAINERS.items():
        found[name] = story(make(data, team), team, folder if team.rank == 0 else None)
        trainer = make(data, team)
        sha256, counters = single[name]["saved"]
        if team.rank == 0:
            trainer.restore(checkpoints.load(place(folder, sha256), sha256), counters)
            team.tell(trainer.counters())
        else:
            counters = team.hear() or {}
        trainer.align(counters)
        trainer.advance(lambda: False)
        found[name]["resumed"] = end(trainer)
    found |= {"norm": norm(team), "first": first_steps(data, team)}
    (folder / f"member{team.rank}").write_text(json.dumps(found))


def first_steps(data: Data, team: Team) -> dict[str, dict[str, list[float]]]:
    """Momentum after one step, which is gradients and decayed weights, of the deep trainers."""
    found = {}
    for name, make in DEEP_TRAINERS.items():
        trainer = make(data, team)
        trainer.advance(after(1) if team.rank == 0 else lambda: False)
        momentum = {key: value for key, value in trainer.state().items() if key.startswith("momentum")}
        found[name] = {key: value.flatten().tolist() for key, value in momentum.items()}
    return found


def norm(team: Team) -> dict[str, list[float]]:
    """A batch norm over 5 images, forward and backward, in float32; this process's part of its outputs."""
    random = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(5, 3, 4, 4, generator=random) * 3 + 1 for _ in range(2))
    weight, bias = (torch.rand(3, generator=random).requires_grad_() for _ in range(2))
    mean, variance, part = torch.zeros(3), torch.ones(3), team.part(5)
    leaf = x[part].clone().requires_grad_()
    with team.synchronised():
        y = functional.batch_norm(leaf, mean, variance, weight, bias, training=True, momentum=0.1, eps=1e-5)
    y.backward(gradient[part])
    tensors = {"y": y, "x": leaf.grad, "weight": weight.grad, "bias": bias.grad, "mean": mean, "variance": variance}
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a single process, and of each of two."""
    folder = tmp_path_factory.mktemp("stories")
    data = images()
    single: dict[str, Any] = {name: story(make(data, ALONE), ALONE, folder) for name, make in TRAINERS.items()}
    single |= {"norm": norm(ALONE), "first": first_steps(data, ALONE)}
    (folder / "single").write_text(json.dumps(single))
    options = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={parallel._free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / name).read_text()) for name in ("single", "member0", "member1")]


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_give_the_loss_curve_of_one(name: str, stories: list[dict[str, Any]]) -> None:
    single, ours, other = (one[name] for one in stories)
    assert len(single["history"]) == SETTINGS.epochs
    for mine, theirs in zip(ours["history"], single["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    assert ours["norms"].keys() == single["norms"].keys()
    assert all(ours["norms"][key] == pytest.approx(value, rel=1e-2, abs=1e-2) for key, value in single["norms"].items())
    assert ours["history"] == other["history"]
    assert ours["digest"] == other["digest"]  # bit for bit the same parameters, norms and momentum on both


@pytest.mark.parametrize("name", TRAINERS)
def test_all_stop_where_process_0_pauses(name: str, stories: list[dict[str, Any]]) -> None:
    single, ours, other = (one[name] for one in stories)
    assert single["paused"] == ours["paused"] == other["paused"] == PAUSED[name]
    assert ours["saved"][1] == single["saved"][1] | {"history": ours["saved"][1]["history"]}


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_go_on_from_the_checkpoint_of_one(name: str, stories: list[dict[str, Any]]) -> None:
    single, ours, other = (one[name] for one in stories)
    for mine, theirs in zip(ours["resumed"]["history"], single["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    assert ours["resumed"]["digest"] == other["resumed"]["digest"]


@pytest.mark.parametrize("name", DEEP_TRAINERS)
def test_two_processes_have_the_gradients_of_one(name: str, stories: list[dict[str, Any]]) -> None:
    single, *members = (one["first"][name] for one in stories)
    assert members[0] == members[1]
    for key, values in single.items():
        ours, theirs = np.array(members[0][key]), np.array(values)
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs) + 1e-5, key


def test_a_synchronised_batch_norm_equals_one_of_the_whole_batch(stories: list[dict[str, Any]]) -> None:
    single, *members = (one["norm"] for one in stories)
    for name in ("y", "x"):  # the processes have 2 and 3 of the images
        assert [len(one[name]) for one in members] == [2 * 48, 3 * 48]
        assert members[0][name] + members[1][name] == pytest.approx(single[name], rel=1e-4, abs=1e-5)
    for name in ("weight", "bias", "mean", "variance"):
        assert members[0][name] == members[1][name] == pytest.approx(single[name], rel=1e-5, abs=1e-5)


class Crowd(Team):
    size = 40


def test_a_batch_that_is_smaller_than_the_processes_is_refused() -> None:
    with pytest.raises(InvalidInput, match="33 images cannot be shared by 40"):
        TRAINERS["scratch"](images(), Crowd())


def test_parts_of_a_batch_cover_it_once() -> None:
    team = object.__new__(Ranks)
    for size, count in ((1, 5), (2, 5), (3, 128), (4, 4)):
        covered = []
        for rank in range(size):
            team.rank, team.size = rank, size
            covered += list(range(count))[team.part(count)]
        assert covered == list(range(count))


if __name__ == "__main__":
    member(Path(sys.argv[1]))
