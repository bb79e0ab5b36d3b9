"""The module map: imports point downwards, and below the line nothing opens, waits, runs or reads a clock."""

from __future__ import annotations

import ast
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mptunnel"

# From the bottom upwards; a module imports only from rows above its own in this list.
CORE = [
    "errors",
    "aead messages packet events keys scheduler",
    "records wgquick noise burst",
    "config session admission",
    "gaps history cap",
    "timers path receipts alarm pathbook",
    "peer standby mtu",
    "serverpeer clientpeer register uplinks role",
    "plan",
    "upkeep pathdesk servers view",
    "client server",
]
# -- the line: whatever opens, waits, runs or reads stands below, that is, higher up
PROGRAM = [
    "native control state tun udp netlink worker wires options report figures micro commands",
    "host lab membership admin",
    "hook pathcommands",
    "loop traffic load crowd watch",
    "floor",
    "program",
    "story",
    "picture",
    "demo",
    "contest",
    "bench",
    "cli",
    "__main__",
]
ROW = {module: number for number, row in enumerate(CORE + PROGRAM) for module in row.split()}
PURE = sorted(chain.from_iterable(row.split() for row in CORE))

WORLD = {
    "socket", "select", "selectors", "time", "datetime", "os", "subprocess", "threading", "signal", "fcntl", "asyncio",
    "multiprocessing", "concurrent", "tempfile", "shutil", "io", "sys", "ctypes", "secrets", "urllib", "http",
}  # fmt: skip
NOT_OF_THE_WORLD = {"burst": {"ctypes"}}  # a library that only computes
WORLDLY_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
WORLDLY_METHODS = {
    "read_text", "read_bytes", "write_text", "write_bytes", "exists", "is_file", "is_dir", "mkdir", "unlink", "iterdir",
    "expanduser", "resolve", "cwd",
}  # fmt: skip
OTHERS = {  # which of our modules may use what is not Python's own
    "cryptography": {"aead", "noise", "keys"},
    "importlib": {"aead", "native"},  # for the extension of qh3, and our own ones
    "click": {"cli", "commands", "pathcommands", "options"},
    "rich": {"picture", "watch"},
    "pytun": {"tun"},
}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
each_module = pytest.mark.parametrize("module", MODULES)


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module: str) -> set[str]:
    """Return the dotted names of all that a module imports, wherever in it, also for type checkers only."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """Return the names of our modules that a module imports."""
    parts = [name.split(".") for name in imports(module)]
    found = {part[1] for part in parts if part[0] == "mptunnel" and len(part) > 1}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


def test_every_module_has_its_row() -> None:
    assert set(MODULES) == set(ROW), "a module is new or gone: give it its row in this map, and in the design"
    assert len(ROW) == sum(len(row.split()) for row in CORE + PROGRAM)


@each_module
def test_imports_point_downwards(module: str) -> None:
    upwards = {name for name in ours(module) if ROW[name] >= ROW[module]}
    assert not upwards, f"{module} imports {', '.join(sorted(upwards))}, which are not below it"


@pytest.mark.parametrize("module", PURE)
def test_the_core_imports_nothing_that_touches_the_world(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & (WORLD - NOT_OF_THE_WORLD.get(module, set()))


@pytest.mark.parametrize("module", PURE)
def test_the_core_opens_and_reads_nothing(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else ""
            method = called.attr if isinstance(called, ast.Attribute) else ""
            assert name not in WORLDLY_CALLS, f"{module}:{node.lineno} calls {name}()"
            assert method not in WORLDLY_METHODS, f"{module}:{node.lineno} calls .{method}()"


@pytest.mark.parametrize("module", PURE)
def test_the_core_takes_no_randomness_but_what_it_is_given(module: str) -> None:
    taken = ast.parse((PACKAGE / f"{module}.py").read_text())
    guarded = {
        id(node)
        for block in ast.walk(taken)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(taken):
        if isinstance(node, ast.Import) and id(node) not in guarded:
            assert not {alias.name for alias in node.names} & {"random", "uuid"}, f"{module}:{node.lineno}"


@each_module
def test_what_is_not_pythons_own_is_used_where_it_should_be(module: str) -> None:
    for name in {name.split(".")[0] for name in imports(module)} & set(OTHERS):
        assert module in OTHERS[name], f"{module} imports {name}"


def test_a_module_that_breaks_the_rules_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peer.py").touch()
    (tmp_path / "path.py").write_text("def f():\n    import time\n    from mptunnel import peer\n    open('x')\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    for check in (
        test_imports_point_downwards,
        test_the_core_imports_nothing_that_touches_the_world,
        test_the_core_opens_and_reads_nothing,
    ):
        with pytest.raises(AssertionError):
            check("path")
