"""The compiled hot modules: used where they belong to the sources, and never half of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mptunnel
from mptunnel import native

PACKAGE = Path(native.__file__).parent
HAS_COMPILER = shutil.which("cc") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()
LOOK = """
from importlib import import_module
from mptunnel import native
{before}
native.use()
loaded = [import_module("mptunnel." + name) for name in native.MODULES]
print(native.core(), *sorted({{module.__file__.rsplit(".", 1)[1] for module in loaded}}))
"""


def looked(package: Path, before: str = "", **environment: str) -> str:
    """Say how the hot modules of this copy run in a process of their own, and of what kinds their files are."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(before=before)],
        check=True, capture_output=True, text=True, cwd=package.parent,
        env={**{name: value for name, value in os.environ.items() if name != "MPTUNNEL_COMPILED"}, **environment},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with what was compiled of it."""
    if not native.is_compiled(PACKAGE):
        if HAS_COMPILER and os.environ.get("CI"):
            pytest.fail("the installation has not compiled these sources, though there is a C compiler")
        pytest.skip("not compiled: no C compiler, or sources newer than the installation")
    shutil.copytree(PACKAGE, tmp_path / "mptunnel", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "mptunnel"


def test_they_are_all_compiled_where_they_belong_to_the_sources(package: Path) -> None:
    assert looked(package) == "compiled so"


def test_sources_that_were_changed_run_as_they_are(package: Path) -> None:
    with (package / "errors.py").open("a") as source:
        source.write("# changed\n")
    assert looked(package) == "interpreted py"


def test_they_can_be_switched_off(package: Path) -> None:
    assert looked(package, MPTUNNEL_COMPILED="0") == "interpreted py"


def test_where_one_has_been_imported_already_none_is_compiled(package: Path) -> None:
    assert looked(package, before="import mptunnel.timers") == "interpreted py"


def test_a_library_that_cannot_be_loaded_is_left_alone(package: Path) -> None:
    (package / native.DIRECTORY / f"{native.LIBRARY}{native.SUFFIX}").write_bytes(b"of another system")
    assert looked(package) == "interpreted py"


def test_with_another_librt_than_they_were_compiled_for_the_sources_run(package: Path) -> None:
    assert looked(package, before="import librt.strings; del librt.strings._C_API") == "interpreted py"


def test_those_of_another_interpreter_are_not_taken(package: Path) -> None:
    for library in (package / native.DIRECTORY).glob(f"*{native.SUFFIX}"):
        library.rename(library.with_name(library.name.replace(native.SUFFIX, ".cpython-399-x86_64-linux-gnu.so")))
    assert looked(package) == "interpreted py"


def test_the_fingerprint_changes_with_every_source(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    before = native.fingerprint(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    changed = native.fingerprint(tmp_path)
    (tmp_path / "b.pyc").write_text("no source")
    assert before != changed == native.fingerprint(tmp_path)
    assert not native.is_compiled(tmp_path)


def test_every_hot_module_is_there_and_a_change_of_the_package_reaches_no_test() -> None:
    assert all((PACKAGE / f"{name}.py").exists() for name in native.MODULES)
    assert mptunnel.__path__ == [str(PACKAGE)] or native.core() == "compiled"
