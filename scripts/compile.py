"""Compile the hot modules when mptunnel is installed: a build hook of hatchling.

What it makes goes into `mptunnel/compiled` (see `mptunnel/native.py`), and stays there while the sources are the same.
Without a C compiler or Python's headers the installation goes on, says why, and what is installed runs interpreted.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from types import ModuleType

    from setuptools import Extension

FLAGS = ["-O2", "-g0", "-fvisibility=hidden"]


class CompileHook(BuildHookInterface[Any]):
    """Puts the compiled modules into a wheel, or beside the sources of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before the files of the wheel are chosen."""
        root = Path(self.root)
        native = load_native(root)
        package = root / "mptunnel"
        if os.environ.get("MPTUNNEL_COMPILED") == "0":
            shutil.rmtree(package / native.DIRECTORY, ignore_errors=True)
            return
        if not native.is_compiled(package):
            why = compile_modules(root, native)
            if why:
                self.app.display_warning(f"mptunnel will run interpreted, at less speed: {why}")
                return
        if version != "editable":
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["force_include"][str(package / native.DIRECTORY)] = f"mptunnel/{native.DIRECTORY}"


def load_native(root: Path) -> ModuleType:
    """Return `mptunnel.native` of these sources, whatever is installed."""
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module("mptunnel.native")
    finally:
        sys.path.remove(str(root))


def compile_modules(root: Path, native: ModuleType) -> str:
    """Make `mptunnel/compiled`. Return why it could not be made, or nothing."""
    from setuptools.errors import BaseError, CCompilerError  # noqa: PLC0415

    package = root / "mptunnel"
    shutil.rmtree(package / native.DIRECTORY, ignore_errors=True)
    before = Path.cwd()
    os.chdir(root)  # mypy names modules by where they lie
    try:
        with tempfile.TemporaryDirectory() as made:
            compile_into(Path(made), native)
            libraries = Path(made, "lib", "mptunnel")
            (libraries / native.STAMP).write_text(native.fingerprint(package))
            shutil.move(libraries, package / native.DIRECTORY)
    except (BaseError, CCompilerError) as error:  # no compiler, no headers
        return str(error)
    except SystemExit:  # said on stderr
        return "mypyc does not take these sources with this Python"
    finally:
        os.chdir(before)
    return ""


def compile_into(made: Path, native: ModuleType) -> None:
    """Compile the modules into `made`/lib, on all processors. Raises what setuptools raises."""
    from mypyc.build import mypycify  # noqa: PLC0415
    from setuptools import Distribution  # noqa: PLC0415
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415

    class Build(build_ext):
        """Compiles the many files of one extension side by side, which setuptools does not."""

        def build_extension(self, ext: Extension) -> None:
            ext.extra_objects, ext.sources = self._objects(ext), []
            super().build_extension(ext)

        def _objects(self, ext: Extension) -> list[str]:
            def compiled(source: str) -> str:
                [made_object] = self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=[*ext.include_dirs, f"{made}/c", f"{made}/c/mptunnel"],
                    extra_postargs=[*ext.extra_compile_args, *FLAGS],
                )
                return str(made_object)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(compiled, ext.sources))

    arguments = [
        "--config-file=", "--ignore-missing-imports", f"--cache-dir={os.devnull}",
        *(f"mptunnel/{name}.py" for name in native.MODULES),
    ]  # fmt: skip
    group = "mptunnel." + native.LIBRARY.removesuffix("__mypyc")
    extensions = mypycify(arguments, multi_file=True, group_name=group, target_dir=f"{made}/c")
    build = Build(Distribution({"name": "mptunnel", "ext_modules": extensions}))
    build.build_lib, build.build_temp = f"{made}/lib", f"{made}/objects"
    build.ensure_finalized()
    build.run()
