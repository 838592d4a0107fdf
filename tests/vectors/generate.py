"""Write protocol/vectors: `python -m tests.vectors.generate`; `--check` says whether the files are what the code would write.

Everything is a function of the code and of fixed seeds, so the same code writes the same bytes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import protocol
from tests.vectors import documents, logs, sessions

VECTORS: Final = Path(protocol.__file__).parent / "vectors"
FILES: Final[dict[str, Callable[[], dict[str, object]]]] = {
    "envelope": documents.envelopes,
    "command": documents.commands,
    "keyset": documents.keysets,
    "replay": documents.judgements,
    "frames": logs.frames,
    "records": logs.records,
    "session": sessions.transcripts,
}


def text_of(name: str) -> str:
    """The whole file of vectors called `name`."""
    return json.dumps({"format": 1, **FILES[name]()}, indent=1, ensure_ascii=False) + "\n"


def stale() -> list[str]:
    """Names of files that are not what the code would write."""
    paths = {name: VECTORS / f"{name}.json" for name in FILES}
    return [name for name, path in paths.items() if not path.exists() or path.read_text() != text_of(name)]


def main(arguments: list[str]) -> int:
    """Write the files, or only compare them."""
    if arguments == ["--check"]:
        for name in stale():
            print(f"{name}.json is not what the code writes: run make vectors", file=sys.stderr)
        return 1 if stale() else 0
    VECTORS.mkdir(exist_ok=True)
    for name in FILES:
        (VECTORS / f"{name}.json").write_text(text_of(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
