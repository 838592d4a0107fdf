"""The two ways to start a shim, for every test that asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.shim import ForkServer, Shim

StartShim = Callable[..., Shim]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """One warm fork server for all tests that do not kill it."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(params=["forked", "alone"])
def start_shim(
    request: pytest.FixtureRequest, fork_server: ForkServer, tmp_path: Path
) -> Iterator[Callable[..., Shim]]:
    """Start shims from the fork server or as their own interpreters; they are ended with the test."""
    shims: list[Shim] = []

    def start(root: Path = tmp_path, **spec: Any) -> Shim:
        server = fork_server if request.param == "forked" else None
        shims.append(Shim(root, server, **spec))
        return shims[-1]

    yield start
    for shim in shims:
        shim.close()
