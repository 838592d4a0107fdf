"""What a shim may import: every module more is memory in every attempt."""

from __future__ import annotations

import subprocess
import sys

from tests.support.shim import ENTRY

# The interpreter's own start, then ours. A name is added here only with a measurement.
INTERPRETER = {
    "__main__", "_abc", "_codecs", "_frozen_importlib", "_frozen_importlib_external", "_imp", "_io", "_signal",
    "_thread", "_warnings", "_weakref", "abc", "builtins", "codecs", "encodings", "encodings.aliases",
    "encodings.utf_8", "io", "marshal", "posix", "sys", "time", "zipimport",
}  # fmt: skip
STDLIB = {
    "__future__", "_ctypes", "_hashlib", "_json", "_socket", "_stat", "_struct", "binascii", "errno", "fcntl", "gc",
    "resource", "select", "termios",
}  # fmt: skip
OURS = {
    "runner", "runner.shim", "runner.shim.birth", "runner.shim.cause", "runner.shim.cgroup", "runner.shim.child",
    "runner.shim.counts", "runner.shim.digest",
    "runner.shim.farewell", "runner.shim.fence",
    "runner.shim.feed", "runner.shim.files", "runner.shim.forkserver", "runner.shim.guard", "runner.shim.hearing", "runner.shim.lease",
    "runner.shim.links", "runner.shim.machine", "runner.shim.modes", "runner.shim.output", "runner.shim.pipes",
    "runner.shim.process", "runner.shim.records", "runner.shim.rehearsal", "runner.shim.report", "runner.shim.spec",
    "runner.shim.system", "runner.shim.terminal", "runner.shim.tree", "runner.shim.wire",
}  # fmt: skip


def test_a_shim_imports_what_is_listed_and_nothing_else() -> None:
    """The entry point, loaded as it is started, loads exactly the allowed modules."""
    code = (
        "import sys, marshal\n"
        f"path = {str(ENTRY)!r}\n"
        "scope = {'__name__': 'entry', '__file__': path}\n"
        "exec(compile(open(path).read(), path, 'exec'), scope)\n"
        "print(*sorted(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - INTERPRETER - STDLIB - OURS == set()


def test_a_wrong_role_is_told() -> None:
    """Anything but the two roles is a usage error."""
    done = subprocess.run([sys.executable, "-I", "-S", str(ENTRY), "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")
