"""ARCHITECTURE.md's never-list, as far as import-linter cannot say it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("latency_profiler", "service", "workers")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {path.relative_to(ROOT).as_posix(): tree for path, tree in TREES.items()}
LONGEST = 400
TABLES = "service/store/models.py"
PRINTERS = {"service/demo.py"} | {name for name in MODULES if name.startswith("service/commands/")}
GLOBAL_GENERATORS = ("np.random.", "numpy.random.", "torch.manual_seed", "torch.random.", "torch.seed")
OWN_GENERATORS = ("np.random.default_rng", "np.random.Generator", "np.random.PCG64", "np.random.SeedSequence",
                  "np.random.Philox")  # fmt: skip
UNSAFE = {"eval", "exec", "torch.load", "yaml.load", "pickle.load", "pickle.loads", "os.system"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def found(wanted: set[str], *, outside: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Places that call one of these names."""
    return [
        f"{name}:{call.lineno} {dotted}"
        for name, tree in MODULES.items()
        if name not in outside
        for dotted, call in calls(tree)
        if dotted in wanted
    ]


def test_there_is_code_to_look_at() -> None:
    assert {"service/up.py", "workers/supervisor.py", "latency_profiler/cost.py"} <= set(MODULES)


def test_only_the_session_commits() -> None:
    commits = [
        f"{name}:{call.lineno}"
        for name, tree in MODULES.items()
        if name != "service/store/session.py"
        for dotted, call in calls(tree)
        if dotted.endswith(".commit")
    ]
    assert commits == []


def test_tables_are_touched_only_in_the_store() -> None:
    """Outside the store nobody builds a statement; enums of models.py may be read."""
    builders = {"select", "insert", "update", "delete", "text"}
    outside = [
        name
        for name, tree in MODULES.items()
        if not name.startswith("service/store/") and name != "service/admin.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sqlalchemy"
        for alias in node.names
        if alias.name in builders
    ]
    assert outside == []


def test_no_module_is_a_drawer_for_everything() -> None:
    assert [name for name in MODULES if Path(name).stem in {"utils", "util", "helpers", "common", "misc"}] == []


def test_packages_export_nothing_again() -> None:
    assert [name for name, tree in MODULES.items() if name.endswith("__init__.py") and list(imports(tree))] == []


def test_nothing_unsafe_is_called() -> None:
    assert found(UNSAFE) == []
    assert [
        name for name, tree in MODULES.items() if {"pickle", "dill", "marshal", "shelve"} & set(imports(tree))
    ] == []


def test_no_shell_is_started() -> None:
    shells = [
        f"{name}:{call.lineno}"
        for name, tree in MODULES.items()
        for _, call in calls(tree)
        if any(keyword.arg == "shell" for keyword in call.keywords)
    ]
    assert shells == []


def test_only_the_command_line_prints() -> None:
    assert found({"print", "console.print"}, outside=PRINTERS) == []


def test_no_global_generator_is_used() -> None:
    """Generators are objects that are passed on; `random` may be the name of one, but not the module."""
    used = [
        f"{name}:{call.lineno} {dotted}"
        for name, tree in MODULES.items()
        for dotted, call in calls(tree)
        if dotted.startswith(GLOBAL_GENERATORS) and not dotted.startswith(OWN_GENERATORS)
    ]
    assert used == []
    assert [name for name, tree in MODULES.items() if "random" in set(imports(tree))] == []


def test_durations_are_not_read_from_the_wall_clock() -> None:
    assert found({"time.time", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}) == []


def test_sampling_is_bounded() -> None:
    """No `while True`, nor any other endless loop, in whatever draws structures."""
    samplers = ("workers/sampling.py", "workers/evolution.py", "workers/budget.py")
    endless = [
        f"{name}:{node.lineno}"
        for name in samplers
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant)
    ]
    assert endless == []


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    lengths.pop(TABLES)  # one table after the other: nothing to split by
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_messages_carry_no_arguments() -> None:
    """Celery tasks take none (but `self`), and senders give none."""
    tasks = [
        node
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("task" in ast.unparse(deco) for deco in node.decorator_list)
    ]
    assert tasks
    for task in tasks:
        taken = [argument.arg for argument in task.args.args + task.args.kwonlyargs if argument.arg != "self"]
        assert (task.name, taken) == (task.name, [])
    sent = [call for tree in MODULES.values() for dotted, call in calls(tree) if dotted.endswith(".send_task")]
    assert sent
    assert all(len(call.args) == 1 and not {"args", "kwargs"} & {k.arg for k in call.keywords} for call in sent)
    assert found({"doorbell.delay", "doorbell.apply_async"}) == []


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("service.app", {"torch", "onnxruntime", "sklearn", "workers"}),
        ("service.reconciler", {"torch", "onnxruntime", "fastapi", "workers"}),
        ("workers.app", {"torch", "fastapi"}),
        ("latency_profiler.agent", {"torch", "fastapi", "sqlalchemy", "celery", "pydantic", "service"}),
        ("latency_profiler.client", {"torch", "fastapi", "sqlalchemy", "celery", "pydantic", "service"}),
        ("service.cli", {"torch", "fastapi", "sqlalchemy", "celery", "pydantic", "onnxruntime", "workers"}),
        ("service.demo", {"torch", "fastapi", "sqlalchemy", "celery", "pydantic", "onnxruntime", "workers"}),
    ],
)
def test_import_brings_nothing_heavy(module: str, banned: set[str]) -> None:
    code = f"import {module}, sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert banned & set(done.stdout.split()) == set()
