"""What this machine is, and how it was while it measured.

A *fingerprint* holds only facts that stay: measurements under two fingerprints never share a table. What changes from
minute to minute (load, frequency) is a *condition*, kept beside every measurement.
"""

import hashlib
import json
import os
import platform
import time
import uuid
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cpuinfo
import psutil

from latency_profiler.errors import InvalidInput
from latency_profiler.runtimes.base import Runtime

GIB = 1 << 30
BOOT = Path("/proc/sys/kernel/random/boot_id")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True)
class Fingerprint:
    """One machine + runtime + settings.

    `memory_gib` is rounded, and `os` ends with the kernel's minor version: neither reserved memory nor a security fix
    makes a new device.
    """

    cpu: str
    cores: int
    memory_gib: int
    os: str
    machine: str
    runtime: str
    runtime_version: str
    threads: int
    batch: int
    dtype: str

    @cached_property
    def sha256(self) -> str:
        """Digest of the facts: the SHA-256 of their JSON with sorted keys and no spaces, in hex."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Fingerprint":
        """Inverse of `to_json`.

        Raises:
            InvalidInput: a fact is missing, unknown or of the wrong type.
        """
        try:
            fingerprint = cls(**facts)
        except TypeError as error:
            raise InvalidInput(f"not a fingerprint: {error}") from error
        for name, field in cls.__dataclass_fields__.items():
            if type(facts[name]) is not field.type:
                raise InvalidInput(f"not a fingerprint: {name!r} is {facts[name]!r}; it must be {field.type}")
        return fingerprint


def fingerprint(runtime: Runtime) -> Fingerprint:
    """What this machine is when it computes with a runtime."""
    settings = runtime.settings
    return Fingerprint(
        cpu=cpu(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / GIB),
        os=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        machine=platform.machine(),
        runtime=runtime.name,
        runtime_version=runtime.version,
        threads=settings.threads,
        batch=settings.batch,
        dtype=settings.dtype,
    )


def host() -> str:
    """What agents of one machine call it, also from containers: a digest of its boot, or of its name and address."""
    text = BOOT.read_text() if BOOT.is_file() else f"{platform.node()} {uuid.getnode()}"
    return hashlib.sha256(text.strip().encode()).hexdigest()[:32]


def agent_version() -> str:
    """Version of this package."""
    return version("secateurs")


def conditions() -> dict[str, Any]:
    """How the machine is now; what it does not tell is left out."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    now: dict[str, Any] = {"at": at, "agent": agent_version(), "source": "measured"}
    now["load"] = round(psutil.getloadavg()[0], 2)
    if frequency := _frequency():
        now["frequency_mhz"] = frequency
    if GOVERNOR.is_file():
        now["governor"] = GOVERNOR.read_text().strip()
    return now


@lru_cache
def cpu() -> str:
    """The CPU's model; asked once, since it takes a second."""
    return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or "unknown")


def _frequency() -> int | None:
    try:
        frequency = psutil.cpu_freq()
    except (NotImplementedError, OSError):
        return None
    return round(frequency.current) if frequency else None
