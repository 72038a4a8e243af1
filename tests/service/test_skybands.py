"""Answers from skybands are those of a full scan, at every moment of their making, on both databases."""

import random
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, insert, select

from service import reconciler
from service.store import devices, measurements, skybands, structures
from service.store.models import (
    Candidate,
    LookupTable,
    Measurement,
    Pricing,
    Result,
    Role,
    Skyband,
    StructureLatency,
    WorkKind,
)
from service.store.session import get_engine, snapshot, transaction
from service.store.skybands import COUNTS, MEMBER, Place
from service.store.structures import Budget
from tests.service.test_structures import KEYS, fill, scan

Rows = list[dict[str, Any]]
NEVER, COUNTED, ALWAYS = "never", "counted", "always"
FIGURES = ("seconds", "p90")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that some thousand candidates reach."""
    for name, value in (("LEAST_NEW", 30), ("MOST_NEW", 120), ("CHUNK", 100), ("MOST", 12)):
        monkeypatch.setattr(skybands, name, value)


def gather() -> None:
    assert reconciler.gather(60.0, threading.Event())


def price(rows: Rows, prices: str, share: float = 1.0) -> None:
    """A walk of re-pricing that has come so far: structures take new latencies in the order of their ids."""
    draw = random.Random(prices)
    ids = sorted({row["structure_id"] for row in rows})
    new = {id_: {name: draw.randrange(1, 1000) / 1000 for name in FIGURES} for id_ in ids[: int(share * len(ids))]}
    with transaction() as session:
        device_id = devices.get(session, "bench").id
        for key in KEYS:
            session.merge(Pricing(device_id=device_id, space_key=key, source="s", prices=prices, structures=1))
        session.execute(delete(StructureLatency).where(StructureLatency.structure_id.in_(new)))
        common = {"device_id": device_id, "prices": prices}
        session.execute(insert(StructureLatency), [{"structure_id": id_, **common, **new[id_]} for id_ in new])
    for row in rows:
        row |= new.get(row["structure_id"], {})


def find_more(rows: Rows, count: int) -> Rows:
    """Further candidates, of structures that were found before, some of them better than ever."""
    draw = random.Random(count)
    new = [
        draw.choice(rows) | {"id": n, "position": n, "encoding_key": f"{n}", "proxy_accuracy": draw.randrange(60) / 50}
        for n in range(len(rows) + 1, len(rows) + count + 1)
    ]
    with transaction() as session:
        session.execute(insert(Candidate), [{name: row[name] for name in row if name not in FIGURES} for row in new])
    return rows + new


def check(rows: Rows, used: str) -> None:
    """Every answer, loose or tight, and the fronts; `used` says which must come from skybands."""
    draw, dataset_id = random.Random(2), rows[0]["dataset_id"]
    with snapshot() as session:
        device_id = devices.get(session, "bench").id
        for cost in (*COUNTS, device_id, f"{device_id}:p90"):
            expected = used == ALWAYS or (used == COUNTED and cost in COUNTS)
            for place in (Place(key, dataset_id, cost) for key in KEYS):
                assert (skybands.read(session, place) is not None) == expected, place
                assert list(structures._front(session, place)) == list(structures._walk_front(session, place))
            for _ in range(6):
                most, limit = draw.choice([0.01, 0.1, 0.5, 2.0]), draw.choice([1, 5, 12, 13])
                budget = Budget(**{cost: int(1000 * most)}) if cost in COUNTS else Budget(latencies={cost: most})
                found = structures.best_candidates(session, KEYS, dataset_id, budget, limit)
                assert found == scan(rows, KEYS, budget, limit), (cost, most, limit)


def measure(rows: Rows, shares: tuple[float, ...]) -> None:
    """Measurements of the best structures, one share of their prediction each, after another one that is too old."""
    best = {row["structure_id"]: row for row in sorted(rows, key=lambda row: -row["proxy_accuracy"])}
    ids = [id_ for id_, row in best.items() if row["seconds"] is not None][: len(shares)]
    with transaction() as session:
        device = devices.get(session, "bench")
        old, new = (measurements.open_table(session, device, {"threads": threads}) for threads in (2, 1))
        measurements.switch(session, device, new)
        for share, id_ in zip(shares, ids, strict=True):
            slow = {name: share * best[id_][name] for name in FIGURES}
            never, ever = dict.fromkeys(FIGURES, 1e-6), dict.fromkeys(FIGURES, 1e6)
            for table_id, purpose, figures in ((new, "check", never), (new, "verify", slow), (old, "verify", ever)):
                table = session.get_one(LookupTable, table_id)
                session.add(
                    Measurement(
                        table_id=table_id, fingerprint_id=table.fingerprint_id, kind=WorkKind.NETWORK, payload={},
                        key=f"{best[id_]['space_key']}|{id_}|{purpose}", iqr=0.0, steady=True, values=[],
                        conditions={}, upload_id="0", **figures,
                    )
                )  # fmt: skip
                session.flush()
            session.add(
                Result(
                    job_id=best[id_]["job_id"], structure_id=id_, dataset_id=best[id_]["dataset_id"],
                    role=Role.WINNER, test_accuracy=0.5, test_loss=1.0, settings={},
                )
            )  # fmt: skip
            for row in rows:
                row |= slow if row["structure_id"] == id_ else {}


def test_a_skyband_comes_as_bytes_and_once(database: str) -> None:
    _, rows = fill(800)
    place = Place(KEYS[0], rows[0]["dataset_id"], "flops")
    gather()
    formats: list[int] = []

    def note(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "skybands.members" in statement:
            formats.append(getattr(cursor, "format", 1))  # SQLite has nothing else

    def read() -> list[tuple[Any, ...]]:
        event.listen(get_engine(), "after_cursor_execute", note)
        with snapshot() as session:
            members = skybands.read(session, place)
        event.remove(get_engine(), "after_cursor_execute", note)
        assert members is not None
        found: list[tuple[Any, ...]] = members.tolist()
        return found

    first = read()
    assert read() == first
    assert formats == [1]
    find_more(rows, 100)
    later = read()
    assert later != first
    assert formats == [1]
    gather()
    assert {row[2] for row in read()} < {row[2] for row in later}
    assert formats == [1, 1]


def test_a_measurement_counts_and_not_the_prediction(database: str) -> None:
    _, rows = fill(800)
    price(rows, "first")
    gather()
    check(rows, ALWAYS)
    measure(rows, 6 * (1.4, 0.5, 100.0))
    check(rows, ALWAYS)
    measured = {row["structure_id"]: row for row in rows}
    with snapshot() as session:
        device_id, dataset_id = devices.get(session, "bench").id, rows[0]["dataset_id"]
        for most in (0.02, 0.2, 1.0):
            budget = Budget(flops=700, latencies={device_id: most, f"{device_id}:p90": 0.5})
            assert structures.best_candidates(session, KEYS, dataset_id, budget, 9) == scan(rows, KEYS, budget, 9)
            tested = structures.best_results(session, KEYS, dataset_id, budget, 50, structures.Sparse())
            ids = set(session.scalars(select(Result.structure_id)))
            trained = [measured[i] for i in ids]
            fast = [one for one in trained if one["seconds"] <= most and one["p90"] <= 0.5]
            within = {one["structure_id"] for one in fast if one["flops"] <= 700}
            assert {row.structure_id for row in tested} == within


def test_structures_without_a_latency_keep_a_device_from_having_one(database: str) -> None:
    _, rows = fill(800)
    check(rows, NEVER)
    gather()
    check(rows, COUNTED)


def test_what_comes_later_is_read_taken_in_or_too_much(database: str) -> None:
    _, rows = fill(600)
    price(rows, "first")
    gather()
    check(rows, ALWAYS)
    rows = find_more(rows, 50)
    check(rows, ALWAYS)
    gather()
    rows = find_more(rows, 400)
    check(rows, NEVER)
    gather()
    check(rows, ALWAYS)


def test_other_prices_are_other_answers(database: str) -> None:
    _, rows = fill(600)
    price(rows, "first")
    gather()
    price(rows, "second", share=0.25)
    check(rows, COUNTED)
    gather()
    check(rows, COUNTED)
    price(rows, "second")
    gather()
    check(rows, ALWAYS)
    price(rows, "first")
    check(rows, COUNTED)


def test_candidates_that_are_being_written_are_waited_for(database: str) -> None:
    """Their ids are smaller than those of others that are there already."""
    if database.startswith("sqlite"):
        pytest.skip("nobody writes while another one does")
    _, rows = fill(600)
    with transaction() as writer:
        late = {name: rows[0][name] for name in rows[0] if name not in FIGURES}
        writer.execute(insert(Candidate), [late | {"id": 601, "position": 601, "encoding_key": "601"}])
        gather()
        check(rows, NEVER)
    gather()
    check([*rows, rows[0] | {"id": 601}], COUNTED)


def test_a_device_takes_its_skybands_along(database: str) -> None:
    _, rows = fill(600)
    price(rows, "first")
    gather()
    with transaction() as session:
        devices.delete(session, "bench")
        assert set(session.scalars(select(Skyband.cost))) == set(COUNTS)


def test_a_reconciler_that_is_told_to_stop_leaves_the_rest(database: str) -> None:
    _, rows = fill(600)
    stop = threading.Event()
    stop.set()
    assert not reconciler.gather(60.0, stop)
    assert not reconciler.gather(-1.0, threading.Event())
    check(rows, NEVER)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=60))
def test_a_skyband_is_what_its_definition_says(drawn: list[tuple[int, int, int]]) -> None:
    rows = [(accuracy, flops, at, cost, f"{at}") for at, (accuracy, flops, cost) in enumerate(drawn)]
    members = np.array(rows, MEMBER)
    members = members[np.lexsort((members["found"], members["flops"], -members["accuracy"]))]
    expected = [
        one["found"] for at, one in enumerate(members)
        if sum(better["cost"] <= one["cost"] for better in members[:at]) < skybands.MOST
    ]  # fmt: skip
    assert skybands._skyband(members)["found"].tolist() == expected
