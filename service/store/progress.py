"""How far the profiles of a device are, and how long what is left of them takes."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.store import measurements, work
from service.store.measurements import FULL, ON_DEMAND
from service.store.models import Device, Measurement, Profile, WorkKind, clock, now

RECENT_SECONDS = 1800.0
"""How far back the rate of measuring is looked at."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a profile is on the device's current table.

    `layers` are all that structures of the space can have, `measured` those of them that need no interpolation.
    `priced` says that the profile's own layers are measured, so that all others can be interpolated. `seconds_left` is
    None while no two uploads came lately.
    """

    profile: Profile
    planned: int
    done: int
    failed: int
    layers: int
    measured: int
    priced: bool
    seconds_left: float | None

    @property
    def waiting(self) -> int:
        """Layers and networks that are neither measured nor failed."""
        return self.planned - self.done - self.failed


def of_device(session: Session, device: Device) -> list[Progress]:
    """How far each profile of a device is, oldest first."""
    measured = set(session.scalars(select(Measurement.key).where(Measurement.table_id == device.table_id)))
    failed, paces = measurements.failures(session, device).keys(), _paces(session, device)
    found = [_progress(profile, measured, failed, paces) for profile in measurements.profiles(session, device)]
    return [replace(one, planned=one.done + one.failed) if _sleeps(one.profile, device) else one for one in found]


def _sleeps(profile: Profile, device: Device) -> bool:
    return profile.mode == ON_DEMAND and profile.planned_table_id != device.table_id


def _progress(profile: Profile, measured: set[str], failed: Set[str], paces: Mapping[WorkKind, float]) -> Progress:
    space = work.profile_space(profile)
    layers, networks = work.profile_keys(profile)
    every = work.layer_keys(space, FULL)
    planned, done, lost = len(layers | networks), len((layers | networks) & measured), len((layers | networks) & failed)
    waiting = {WorkKind.LAYER: len(layers - measured - failed), WorkKind.NETWORK: len(networks - measured - failed)}
    left = sum(paces.get(kind, max(paces.values())) * count for kind, count in waiting.items()) if paces else None
    return Progress(profile, planned, done, lost, len(every), len(every & measured), layers <= measured, left)


def _paces(session: Session, device: Device) -> dict[WorkKind, float]:
    """Seconds per measurement of a kind since the first upload of the last minutes, which took who knows how long."""
    uploads = select(Measurement.kind, func.min(Measurement.created_at), func.count()).where(
        Measurement.table_id == device.table_id, Measurement.created_at > now() - RECENT_SECONDS
    )  # fmt: skip
    found: dict[WorkKind, list[tuple[float, int]]] = {}
    for kind, at, count in session.execute(uploads.group_by(Measurement.kind, Measurement.upload_id)):
        found.setdefault(kind, []).append((at, count))
    until, first = clock(session), {kind: min(times) for kind, times in found.items()}
    counts = {kind: sum(count for _, count in times) - first[kind][1] for kind, times in found.items()}
    return {kind: (until - first[kind][0]) / count for kind, count in counts.items() if count}
