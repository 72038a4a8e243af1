"""Lookup tables that come and go: all that was measured, with its raw values and conditions, as one JSON document.

A document is `LatencyTable.to_json` with more in each entry, and with the networks that the table's fits are from.
What was taken is given out again as it came; a document without raw values is taken, too.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from latency_profiler.cost import Statistic
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import LatencyTable
from service.store import devices, measurements, work
from service.store.models import Device, LookupTable, Measurement, TableFit, WorkKind

Json = dict[str, Any]
FITS = {Statistic.P50: "fits", Statistic.P90: "p90_fits"}
RAW = ("seconds", "p90", "iqr", "steady", "values", "conditions")
NETWORK = ("space_key", "channels", "purpose")


def export(session: Session, device_name: str) -> Json:
    """A device's current table; an empty one where no agent has come.

    Raises:
        NotFound: no device has this name.
    """
    device = devices.get(session, device_name)
    fingerprint = measurements.current_fingerprint(session, device)
    facts = fingerprint.facts if fingerprint else {}
    return {
        "device": device.name,
        "fingerprint": facts.get("source") or (fingerprint.sha256 if fingerprint else ""),
        "facts": facts.get("facts", {}) if facts.get("imported") else facts,
        "entries": [_entry(row) for row in _rows(session, device, WorkKind.LAYER)],
        "networks": [_network(row) for row in _rows(session, device, WorkKind.NETWORK) if not work.for_job(row.key)],
        **{name: _fits(session, device, statistic) for statistic, name in FITS.items()},
    }


def take(session: Session, device: Device, document: Mapping[str, Any]) -> tuple[int, bool]:
    """Take what was measured elsewhere, under a fingerprint of its own.

    What was taken from the same source before stays; a document that says otherwise of the same layers is of another
    measurement, and a table of its own.

    Returns:
        How many entries are new, and whether the table is the device's current one: it becomes that only where no
        agent has come.

    Raises:
        InvalidInput: not a lookup table.
    """
    devices.lock(session, device)
    source: Json = {"imported": True, "source": LatencyTable.from_json(dict(document)).fingerprint}
    facts = document.get("facts")
    source |= {"facts": facts} if facts else {}
    given = {values["key"]: values for values in _given(document)}
    table_id = measurements.open_table(session, device, source)
    known = _seconds(session, table_id)
    if any(known[key] != given[key]["seconds"] for key in known.keys() & given.keys()):
        table_id = measurements.open_table(session, device, source | {"version": _digest(given)})
        known = _seconds(session, table_id)
    table = session.get_one(LookupTable, table_id)
    new = {key: _row(table, values) for key, values in given.items() if key not in known}
    if new:
        session.execute(insert(Measurement), list(new.values()))
    for statistic, name in FITS.items():
        for key, fit in (document.get(name) or {}).items():
            session.merge(TableFit(table_id=table_id, space_key=key, statistic=statistic, **fit))
    if measurements.measured_table(session, device) is None:
        measurements.switch(session, device, table_id)
    return sum(row["kind"] is WorkKind.LAYER for row in new.values()), device.table_id == table_id


def _seconds(session: Session, table_id: str) -> dict[str, float]:
    query = select(Measurement.key, Measurement.seconds).where(Measurement.table_id == table_id)
    return {key: seconds for key, seconds in session.execute(query)}


def _digest(given: Mapping[str, Json]) -> str:
    seconds = sorted((key, values["seconds"]) for key, values in given.items())
    return hashlib.sha256(json.dumps(seconds).encode()).hexdigest()[:16]


def _rows(session: Session, device: Device, kind: WorkKind) -> Sequence[Measurement]:
    query = select(Measurement).where(Measurement.table_id == device.table_id, Measurement.kind == kind)
    return sorted(session.scalars(query), key=lambda row: row.key)


def _entry(row: Measurement) -> Json:
    raw = {name: getattr(row, name) for name in RAW}
    return {"layer": row.payload["layer"], "count": row.payload.get("count", len(row.values)), **raw}


def _network(row: Measurement) -> Json:
    about = {name: row.payload[name] for name in NETWORK}
    return {"key": row.key, **about, **{name: getattr(row, name) for name in RAW}}


def _fits(session: Session, device: Device, statistic: Statistic) -> Json:
    found = measurements.fits(session, device.table_id, statistic) if device.table_id else {}
    return {key: asdict(fit) for key, fit in sorted(found.items())}


def _given(document: Mapping[str, Any]) -> Iterator[Json]:
    """Kind, key, payload and figures of all that a document holds."""
    for entry in document["entries"]:
        payload = {"layer": entry["layer"], "count": entry.get("count") or len(entry.get("values") or ()) or 1}
        key = Layer.from_json(entry["layer"]).key
        yield {"kind": WorkKind.LAYER, "key": key, "payload": payload, **_raw(entry)}
    for network in document.get("networks") or ():
        payload = {name: network[name] for name in NETWORK}
        yield {"kind": WorkKind.NETWORK, "key": network["key"], "payload": payload, **_raw(network)}


def _raw(figures: Mapping[str, Any]) -> Json:
    given = {name: figures[name] for name in RAW if figures.get(name) is not None}
    return {"p90": None, "iqr": 0.0, "steady": True, "values": [], "conditions": {"source": "imported"}} | given


def _row(table: LookupTable, values: Json) -> Json:
    return {"table_id": table.id, "fingerprint_id": table.fingerprint_id, "upload_id": "import", **values}


def batch(session: Session, device: Device) -> int:
    """Images of a run on a device: those of all seconds in its current table."""
    fingerprint = measurements.current_fingerprint(session, device)
    facts = fingerprint.facts if fingerprint else {}
    told = facts.get("facts") if facts.get("imported") else facts
    found = told.get("batch") if isinstance(told, dict) else None
    return found if isinstance(found, int) and found > 0 else 1
