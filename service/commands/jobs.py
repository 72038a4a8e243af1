"""Ask what can be searched, submit searches, follow them, and ask what they found."""

import json
import uuid
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from latency_profiler.cost import Statistic
from latency_profiler.errors import InvalidInput
from latency_profiler.spaces.registry import SPACES
from service.choices import Effort, Method, Objective, Strategy
from service.commands import tables
from service.commands.login import connect
from service.commands.options import (
    AnyWidth,
    Count,
    Devices,
    ImageSize,
    JobId,
    Json,
    Key,
    LastLayer,
    Limit,
    MaxMs,
    Quantile,
    Server,
    err,
    given,
    latency_bounds,
    out,
    parse_count,
    read_json,
)  # fmt: skip
from service.commands.watching import follow

WANTED = {
    "space": f"name a space: {', '.join(sorted(SPACES))}",
    "dataset": "give --dataset, e.g. digits; `secateurs datasets` lists all",
    "constraints": "give --max-flops, --max-parameters or --device with --max-ms",
}
"""What no job goes without."""
METHODS = f"<{'|'.join(get_args(Method))}>"


def submit(
    space: Annotated[str | None, typer.Argument(metavar="[SPACE]", help="Search space, e.g. mobilenet_v1.")] = None,
    dataset: Annotated[str | None, typer.Option(help="What to train on, e.g. digits.")] = None,
    max_flops: Count = None,
    min_flops: Count = None,
    max_parameters: Count = None,
    device: Devices = None,
    max_ms: MaxMs = None,
    statistic: Quantile = None,
    measure_on: Annotated[list[str] | None, typer.Option(help="Also measure the winner on this device.")] = None,
    effort: Annotated[Effort | None, typer.Option(help="How much is trained and searched (default: standard).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all that is random (default: 0).")] = None,
    image_size: ImageSize = None,
    width: AnyWidth = None,
    last_layer: LastLayer = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the PruningNet.")] = None,
    generations: Annotated[int | None, typer.Option(min=1, help="Generations of the search.")] = None,
    population: Annotated[int | None, typer.Option(min=2, help="Candidates of a generation.")] = None,
    retraining_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs from scratch.")] = None,
    finalists: Annotated[int | None, typer.Option(help="Train so many of the best a little to choose one.")] = None,
    fidelity: Annotated[int | None, typer.Option(help="Train so many random structures to judge the proxy.")] = None,
    objective: Annotated[Objective | None, typer.Option(help="One winner, or the best at every cost.")] = None,
    strategy: Annotated[Strategy | None, typer.Option(help="How the search goes; random to compare with.")] = None,
    baselines: Annotated[bool | None, typer.Option(help="Also train the uniform network at the budget.")] = None,
    method: Annotated[Method | None, typer.Option(help="How the network is made smaller.")] = None,
    compare_with: Annotated[
        list[str] | None, typer.Option(metavar=METHODS, help="A further method under the same budget.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="Job whose winner pruning methods begin with.")] = None,
    name: Annotated[str | None, typer.Option(help="A name of your own.")] = None,
    file: Annotated[Path | None, typer.Option(help="The job as JSON (- is standard input); options win.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key again submits nothing new.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until it ends.")] = False,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Submit a search; prints the job's id."""
    job = read_json(file) if file else {}
    counts = {"flops": given(max=parse_count(max_flops), min=parse_count(min_flops)),
              "parameters": given(max=parse_count(max_parameters))}  # fmt: skip
    job |= given(
        space=space, dataset=dataset, constraints=_constraints(counts, latency_bounds(device, max_ms), statistic),
        measure_on=measure_on, effort=effort, seed=seed, image_size=image_size, width=width, last_layer=last_layer,
        objective=objective, baselines=baselines, method=method, name=name,
        compare_with=compare_with, start=start,
    )  # fmt: skip
    for part, options in (
        ("training", given(epochs=epochs)),
        ("search", given(strategy=strategy, generations=generations, population=population)),
        ("retraining", given(epochs=retraining_epochs, finalists=finalists)),
        ("fidelity", given(structures=fidelity)),
    ):
        if options and not isinstance(job.get(part) or {}, dict):
            raise InvalidInput(f"{file}: {part} must be an object, such as {json.dumps({part: options})}")
        if options:
            job[part] = (job.get(part) or {}) | options
    if missing := [say for field, say in WANTED.items() if not job.get(field)]:
        raise InvalidInput(missing[0])
    with connect(server, key) as client:
        submitted = client.submit(job, idempotency_key or uuid.uuid4().hex)
        if not (as_json and watch):
            tables.show_json(submitted) if as_json else out.print(submitted["id"], soft_wrap=True)
        if watch:
            _watch(client, submitted["id"], as_json)


def spaces(server: Server = None, key: Key = None, as_json: Json = False) -> None:
    """What can be searched: spaces, their genes, and the widths that a gene chooses among."""
    with connect(server, key) as client:
        answer = client.spaces()
    tables.show_json(answer) if as_json else tables.show_rows(out, answer["items"], "spaces")


def _constraints(
    counts: dict[str, dict[str, Any]], latencies: dict[str, float], statistic: Statistic | None
) -> list[dict[str, Any]]:
    bounds: list[dict[str, Any]] = [{"metric": metric, **bound} for metric, bound in counts.items() if bound]
    return bounds + [
        {"metric": "latency", "device": name, "max_ms": most, **given(statistic=statistic)}
        for name, most in latencies.items()
    ]


def watch(job: JobId, server: Server = None, key: Key = None, as_json: Json = False) -> None:
    """Follow a job until it ends; exit code 0 only when it succeeded."""
    with connect(server, key) as client:
        _watch(client, job, as_json)


def _watch(client: Any, job_id: str, as_json: bool) -> None:
    job = follow(client, job_id, err)
    tables.show_json(job) if as_json else tables.show_job(out, job)
    if job["state"] != "succeeded":
        raise typer.Exit(1)


def jobs(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Show this one only.")] = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    space: Annotated[str | None, typer.Option(help="Only jobs on this space.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only jobs on this dataset.")] = None,
    limit: Limit = 20,
    cursor: Annotated[str | None, typer.Option(help="`next` of the page before.")] = None,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List jobs, the newest first, or show one."""
    with connect(server, key) as client:
        if job is not None:
            one = client.job(job)
            return tables.show_json(one) if as_json else tables.show_job(out, one)
        page = client.jobs(limit, cursor, state=state, space=space, dataset=dataset)
    tables.show_json(page) if as_json else tables.show_jobs(out, page["items"])
    _hint(page, as_json)


def _hint(page: dict[str, Any], as_json: bool) -> None:
    if page.get("next") and not as_json:
        err.print(f"there are more: --cursor {page['next']}")


def cancel(job: JobId, server: Server = None, key: Key = None, as_json: Json = False) -> None:
    """Ask a job to stop; it does within a step."""
    with connect(server, key) as client:
        answer = client.cancel(job)
    tables.show_json(answer) if as_json else tables.show_jobs(out, [answer])


def candidates(
    job: JobId,
    sort: Annotated[str | None, typer.Option(help="By what, e.g. proxy_accuracy, flops or generation.")] = None,
    limit: Limit = 20,
    cursor: Annotated[str | None, typer.Option(help="`next` of the page before.")] = None,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Every structure that a job judged."""
    with connect(server, key) as client:
        page = client.candidates(job, limit, cursor, sort=sort)
    tables.show_json(page) if as_json else tables.show_structures(out, page["items"])
    _hint(page, as_json)


def best(
    space: Annotated[str, typer.Option(help="Structures of this space.")],
    dataset: Annotated[str, typer.Option(help="Judged on this dataset.")],
    max_flops: Count = None,
    max_parameters: Count = None,
    device: Devices = None,
    max_ms: MaxMs = None,
    statistic: Quantile = None,
    image_size: ImageSize = None,
    width: AnyWidth = None,
    accuracy: Annotated[str | None, typer.Option(help="Rank by proxy (every candidate) or test accuracy.")] = None,
    limit: Limit = 10,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """The most accurate structures within bounds, across all jobs."""
    bounds = latency_bounds(device, max_ms)
    flops, parameters = parse_count(max_flops), parse_count(max_parameters)
    with connect(server, key) as client:
        answer = client.best(
            space,
            dataset,
            max_flops=flops,
            max_parameters=parameters,
            max_latency_ms=bounds,
            limit=limit,
            statistic=statistic,
            image_size=image_size,
            width=width,
            accuracy=accuracy,
        )
    tables.show_json(answer) if as_json else tables.show_structures(out, answer["items"])


def pareto(
    space: Annotated[str, typer.Option(help="Structures of this space.")],
    dataset: Annotated[str, typer.Option(help="Judged on this dataset.")],
    device: Annotated[str | None, typer.Option(help="Against latency on this device.")] = None,
    statistic: Quantile = None,
    metric: Annotated[str | None, typer.Option(help="Against flops (the default) or parameters.")] = None,
    image_size: ImageSize = None,
    width: AnyWidth = None,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """The front of accuracy against cost."""
    with connect(server, key) as client:
        answer = client.pareto(
            space, dataset, device, statistic=statistic, metric=metric, image_size=image_size, width=width
        )
    tables.show_json(answer) if as_json else tables.show_structures(out, answer["items"])
