"""The payload's own cgroup (version 2): the one place where nothing that was born in it can hide.

Theory of operation. The leaf is a sibling of the cgroup the shim lives in. The shim steps into it for the length of
one `posix_spawn`, so that the child is born inside, and steps back: whatever is done to the whole leaf is done to the
payload only. Without a leaf, or when any of this fails, the other tiers remain and the failure is kept to be told.

Rule 1. Never a failed start because of a cgroup.
Rule 2. A leaf with somebody in it is somebody else's: it is not taken.
Rule 3. The whole leaf is killed or frozen only while the shim is known to be outside.
"""

from __future__ import annotations

import errno
import posix as os
import time

from runner.shim import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# A payload may make cgroups below its leaf; more of them than this are still killed with it, only not looked into.
GROUPS_MAX: Final = 1_000
# The last process of a leaf is out of it a moment after it stopped being listed.
REMOVE_TRIES: Final = 10
REMOVE_PAUSE_S: Final = 0.002
_WRITE: Final = os.O_WRONLY | os.O_CLOEXEC


class Leaf:
    """The leaf at `path`; `active` from the moment the child was born in it, `failure` says why it is not."""

    __slots__ = ("_doors", "_home", "active", "crowded", "failure", "path")

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.active = False
        self.crowded = False  # the shim could not step back
        self.failure: OSError | None = None
        self._home = b""
        self._doors: tuple[int, int] | None = None

    def enter(self) -> None:
        """Make the leaf and step in; the next child is born inside. The kernel may take milliseconds for it."""
        made = False
        try:
            self._make()
            made = True
            self._home = home_of(self.path)
            self._doors = self._open_doors()
            os.write(self._doors[0], b"0")
        except OSError as exc:
            self.failure = exc
            self._close()
            if made:
                remove(self.path)
        else:
            self.active = True

    def leave(self) -> None:
        """Step back, if we stepped in."""
        if self._doors is None:
            return
        try:
            os.write(self._doors[1], b"0")
        except OSError as exc:
            self.failure = exc
            self.crowded = True
        self._close()

    def members(self) -> list[int]:
        """Pids of everybody in the leaf and below it, zombies excluded."""
        return members(self.path)

    def kill(self) -> bool:
        """Kill everybody inside at once, whatever they fork meanwhile; False when that is not possible."""
        return not self.crowded and _say(self.path, b"cgroup.kill", b"1")

    def freeze(self) -> bool:
        """Freeze everybody inside; False when that is not possible."""
        return not self.crowded and _say(self.path, b"cgroup.freeze", b"1")

    def thaw(self) -> None:
        """Undo `freeze`, also one that was not ours: who is frozen takes no TERM."""
        _say(self.path, b"cgroup.freeze", b"0")

    def evict(self, pid: int) -> None:
        """Move a process that may live on to where we live, as far as the kernel lets us."""
        try:
            home = self._home or home_of(self.path)
        except OSError:
            return
        _say(home, b"cgroup.procs", b"%d" % pid)

    def remove(self) -> bool:
        """Remove the leaf and what is below it; False when somebody is still inside."""
        return remove(self.path)

    def _make(self) -> None:
        try:
            os.mkdir(self.path, 0o755)
        except FileExistsError:
            # An empty one is made anew: nobody knows what was written to its files.
            if not remove(self.path):
                raise OSError(errno.EBUSY, "somebody is in the leaf already") from None
            os.mkdir(self.path, 0o755)

    def _open_doors(self) -> tuple[int, int]:
        # A directory without this file is no cgroup, or one of a kernel whose cgroups cannot be killed whole.
        os.close(os.open(self.path + b"/cgroup.kill", _WRITE))
        inward = os.open(self.path + b"/cgroup.procs", _WRITE)
        try:
            return inward, os.open(self._home + b"/cgroup.procs", _WRITE)
        except OSError:
            os.close(inward)
            raise

    def _close(self) -> None:
        if self._doors is not None:
            for fd in self._doors:
                os.close(fd)
            self._doors = None


def home_of(path: bytes) -> bytes:
    """Where this process lives in the hierarchy that `path` is in. Raises OSError."""
    # The hierarchy begins where no directory above has the file that every cgroup has.
    top = path.rpartition(b"/")[0]
    while os.access(top.rpartition(b"/")[0] + b"/cgroup.procs", os.F_OK):
        top = top.rpartition(b"/")[0]
    for line in system.read_whole("/proc/self/cgroup").splitlines():
        if line.startswith(b"0::/"):
            return top + line[3:].rstrip(b"/")
    raise OSError(errno.ENOENT, "no version 2 cgroup of our own")


def members(path: bytes) -> list[int]:
    """Pids of everybody in the cgroup at `path` and below it; none when it is gone."""
    found: list[int] = []
    for group in groups(path):
        try:
            data = system.read_whole(group + b"/cgroup.procs")
        except OSError:
            continue
        # 0 stands for a process that our pid namespace does not know.
        found.extend(int(each) for each in data.split() if each != b"0")
    return found


def groups(path: bytes) -> list[bytes]:
    """The cgroup at `path` and those below it, parents first."""
    found = [path]
    for group in found:
        if len(found) >= GROUPS_MAX:
            break
        try:
            # Each cgroup below is one more link, as in any directory.
            names = os.listdir(group) if os.stat(group).st_nlink > 2 else []
        except OSError:
            continue
        below = (group + b"/" + name for name in names)
        found.extend(each for each in below if os.access(each + b"/cgroup.procs", os.F_OK))
    return found


def remove(path: bytes) -> bool:
    """Remove the cgroup at `path` and those below it; False when somebody is still inside."""
    for tried in range(REMOVE_TRIES):
        busy = False
        for group in reversed(groups(path)):
            try:
                os.rmdir(group)
            except FileNotFoundError:
                continue
            except OSError:
                busy = True
        if not busy or members(path):
            return not busy
        if tried < REMOVE_TRIES - 1:
            time.sleep(REMOVE_PAUSE_S)
    return False


def _say(path: bytes, name: bytes, word: bytes) -> bool:
    try:
        fd = os.open(path + b"/" + name, _WRITE)
        try:
            os.write(fd, word)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True
