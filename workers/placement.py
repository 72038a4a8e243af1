"""Where tensors live: the device of a process, the type of its products, and how data gets there.

Trainings from scratch have run on a GPU once; all else only in tests, with stand-ins and on torch's `meta` device. In
the training loop the host never waits for the device: no value is read back before an epoch's end, and what a step
needs from the host is copied from pinned memory.
"""

import torch
from torch import Tensor

from latency_profiler.errors import InvalidInput

RESIDENT_SHARE = 0.25
"""A dataset that needs no more than this share of a GPU's free memory is kept there."""

SMALL_IMAGE = 64
"""Side in pixels up to which networks are small: one thread of a processor, or a GPU's float32, serves them best."""


class NoSuchDevice(InvalidInput):
    """This machine does not have the device that the settings ask for."""


def choose(asked: str, rank: int = 0, processes: int = 1) -> torch.device:
    """The device of the process `rank` of several on this machine; a GPU gives the same bits each time from then on.

    Args:
        asked: `cpu`; `cuda`, one GPU per process; `cuda:1`, that GPU; `auto`, GPUs if there is one for every process.

    Raises:
        NoSuchDevice: there are not so many GPUs, or several processes would share one.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and gpus < processes):
        return torch.device("cpu")
    wanted = torch.device("cuda" if asked == "auto" else asked)
    if wanted.index is not None and processes > 1:
        raise NoSuchDevice(f"SECATEURS_DEVICE={asked} is one GPU; {processes} training processes need one each: cuda")
    index = rank if wanted.index is None else wanted.index
    if max(index + 1, processes) > gpus:
        need = asked if processes == 1 else f"{processes} training processes"
        raise NoSuchDevice(f"SECATEURS_DEVICE={asked}: {need} cannot have a GPU, torch sees {gpus} of them here")
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", index)


def precision(device: torch.device, image_size: int) -> torch.dtype:
    """What convolutions compute in: bfloat16 on GPUs that have it, which needs no scaling of the loss; else float32.

    Networks of small images keep a GPU waiting for launches, of which casts are only more. float16 is not used: its
    gradients underflow without a scaler, whose checks make the host wait.
    """
    large = device.type == "cuda" and image_size > SMALL_IMAGE
    if large and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; a GPU takes it from pinned memory while the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def home(size: int, device: torch.device) -> torch.device:
    """Where to keep a dataset of so many bytes: on a GPU that has room, else with the host."""
    if device.type == "cuda" and size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")
