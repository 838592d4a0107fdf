"""Shims of a user without rights, and a child that becomes somebody they may not signal. For root only."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.shim import ENTRY

NOBODY = 65534


def interpreter(folder: Path, *, cgroup: Path | None = None) -> str:
    """A program that runs Python as nobody, in `cgroup` where one is given; skips where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv")
    drop = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # Our own interpreter may be in a home that nobody else may enter.
    for python in (sys.executable, "/usr/bin/python3"):
        asked = [*drop, python, "-I", "-S", str(ENTRY), "nonsense"]
        if subprocess.run(asked, capture_output=True, check=False, cwd="/").stderr.startswith(b"usage:"):
            script = folder / "python-of-nobody"
            enter = f"echo 0 > {cgroup}/cgroup.procs\n" if cgroup is not None else ""
            script.write_text(f'#!/bin/sh\n{enter}exec {" ".join(drop)} {python} "$@"\n')
            script.chmod(0o755)
            return str(script)
    pytest.skip("no Python that nobody may run, or it may not read this project")


def becomes_root(folder: Path) -> list[str]:
    """The beginning of an argv whose program becomes root for good, whoever runs it; `folder` is made searchable for all."""
    folder.chmod(0o755)
    program = folder / "becomes-root"
    shutil.copy(str(shutil.which("setpriv")), program)
    program.chmod(0o755 | stat.S_ISUID)
    if os.statvfs(folder).f_flag & os.ST_NOSUID:
        pytest.skip("needs a file system that keeps set-user-id bits")
    return [str(program), "--reuid=0"]
