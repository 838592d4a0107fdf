"""What the documents say of the tree is true, and the house rules that no linter knows are kept."""

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Final

import click
import pytest

from controlplane import failpoints as plane_failpoints
from controlplane.cli import cli as control_cli
from runner import failpoints as runner_failpoints
from runner.cli import cli as runner_cli
from runner.logs import Event

ROOT: Final = Path(__file__).resolve().parents[2]
MADE: Final = frozenset({"__pycache__", "build", "dist", "node_modules"})
"""Directories that tools make; hidden ones are skipped as well, but for `.ci`."""
PACKAGES: Final = ("protocol", "terminal", "runner", "controlplane")
README_LINES_MAX: Final = 180
FILE_LINES_MAX: Final = 400
FUNCTION_LINES_MAX: Final = 60
ADDRESS_CHARS_MAX: Final = 100
"""A longer address is a download, and downloads are for package clients."""
REGISTRIES: Final = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs"),
        ("npmmirror", "com"),
        ("crates", "io"),
        ("rubygems", "org"),
        ("proxy", "golang"),
        ("repo", "maven"),
        ("anaconda", "org"),
    )
)
ARCHIVES: Final = r"\.(whl|zip|tgz|deb|rpm|tar\.(gz|xz|bz2|zst))\b"
MARKERS: Final = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
CODE: Final = re.compile(r"`([^`\n]+)`")
FENCE: Final = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SHAPE: Final = ("## Context", "## Options", "## Decision", "## Consequences", "- Good, because", "- Bad, because")


def files(*suffixes: str) -> Iterator[Path]:
    """Every file of the project with one of these suffixes (none given: every file)."""
    for place, directories, names in os.walk(ROOT):
        directories[:] = sorted(
            name
            for name in directories
            if name not in MADE and not name.endswith(".egg-info") and (name == ".ci" or not name.startswith("."))
        )
        for name in sorted(names):
            if not suffixes or name.endswith(suffixes):
                yield Path(place, name)


def shown(path: Path) -> str:
    """A path as people write it."""
    return path.relative_to(ROOT).as_posix()


def text(name: str) -> str:
    """The content of a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def tree(path: Path) -> ast.Module:
    """The syntax of a module."""
    return ast.parse(path.read_text(encoding="utf-8"), shown(path))


def section(document: str, title: str) -> str:
    """What stands below a heading of the second level."""
    return document.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def leaves(group: click.Group, name: str) -> Iterator[str]:
    """Every verb of a command line that does something, with the names that lead to it."""
    ctx = click.Context(group)
    for word in group.list_commands(ctx):
        command = group.get_command(ctx, word)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, f"{name} {word}")
        else:
            yield f"{name} {word}"


def is_path(code: str) -> bool:
    """Whether a piece of code in a document names a file or directory of the project."""
    first = code.partition("/")[0]
    return re.fullmatch(r"[\w./-]+", code) is not None and "/" in code and (ROOT / first).is_dir() and first != ""


DOCUMENTS: Final = [shown(path) for path in files(".md")]
DECISIONS: Final = sorted(shown(path) for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    """Paths in backticks begin with a directory of the project and lead to something."""
    named = [code for code in CODE.findall(FENCE.sub("", text(document))) if is_path(code)]
    assert [code for code in named if not (ROOT / code).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_within_the_project_leads_somewhere(document: str) -> None:
    """Relative links are followed from the document's own place."""
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text(document)))
    inside = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in inside if not (ROOT / document).parent.joinpath(link).exists()] == []


def test_the_code_map_names_every_module() -> None:
    """Each module of our packages stands in ARCHITECTURE's code map, or the directory it is in, where that is one line."""
    named = set(CODE.findall(section(text("ARCHITECTURE.md"), "Code map")))
    whole = {"runner/verbs/", "runner/units/"}
    modules = [shown(path) for path in files(".py") if shown(path).startswith(PACKAGES)]
    wanted = [name for name in modules if not name.endswith(("__init__.py", "__main__.py"))]
    assert [name for name in wanted if name not in named and f"{name.rpartition('/')[0]}/" not in whole & named] == []


def test_every_name_in_the_architecture_is_in_the_code() -> None:
    """Identifiers in backticks occur in the code as words."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in files(".py", ".sql", ".toml"))
    words = set(re.findall(r"\w+", code))
    named = [name for name in CODE.findall(text("ARCHITECTURE.md")) if re.fullmatch(r"[A-Za-z_][\w.]*", name)]
    loose = [name for name in named if not name.endswith((".json", ".py", ".md", ".db"))]
    assert [name for name in loose if not set(name.split(".")) <= words] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_of_a_document_is_in_the_makefile(document: str) -> None:
    """`make word`, in the text or in a block of commands."""
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|&& )make ([a-z]+)\b", text(document), re.MULTILINE))
    assert named, "the document names targets"
    assert named - targets == set()


def test_the_readme_lists_the_verbs_that_there_are() -> None:
    """The tables of verbs and the two command lines are the same set."""
    listed = {code for code in CODE.findall(section(text("README.md"), "Verbs")) if " " in code and "--" not in code}
    assert listed == {*leaves(runner_cli, "runner"), *leaves(control_cli, "runner-control")}


def test_the_readme_is_short() -> None:
    """It is read whole or not at all."""
    assert len(text("README.md").splitlines()) <= README_LINES_MAX


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_decision_says_what_it_costs(decision: str) -> None:
    """Every ADR has the template's parts, a good and a bad consequence, and its number in its title."""
    content = text(decision)
    assert [part for part in SHAPE if part not in content] == []
    assert content.startswith(f"# {Path(decision).name[:4]}. ")
    assert Path(decision).name in text("docs/index.md")


def test_every_dependency_has_its_reason() -> None:
    """The tables of the decision on dependencies name what pyproject.toml does, and nothing else."""
    project = tomllib.loads(text("pyproject.toml"))
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    wanted = list(chain(project["project"]["dependencies"], *extras.values(), *groups.values()))
    names = {re.split(r"[<>=!~\[; ]", one)[0] for one in wanted}
    rows = re.findall(r"^\| ([a-z][a-z0-9-]*) \|", text("docs/adr/0009-dependencies.md"), re.MULTILINE)
    assert set(rows) - {"package"} == names


def test_no_registry_is_named_and_nothing_is_downloaded() -> None:
    """No host of a package registry and no address of an archive stands anywhere: the machine's own clients know."""
    found = []
    for path in files():
        content = path.read_bytes().decode("utf-8", "replace")
        hosts = [host for host in REGISTRIES if host in content]
        addresses = re.findall(r"https?://[^\s\"'<>)`]+", content)
        long = [one for one in addresses if len(one) > ADDRESS_CHARS_MAX or re.search(ARCHIVES, one)]
        found += [f"{shown(path)}: {one}" for one in (*hosts, *long)]
    assert found == []


def test_nothing_is_left_for_a_later_day() -> None:
    """No marker of unfinished work in any module."""
    assert [shown(path) for path in files(".py") if MARKERS.search(path.read_text(encoding="utf-8"))] == []


def test_every_module_says_what_it_is() -> None:
    """Each module that is not empty has a docstring."""
    trees = {shown(path): tree(path) for path in files(".py")}
    assert [name for name, module in trees.items() if module.body and not ast.get_docstring(module)] == []


def test_no_file_is_two_files() -> None:
    """Modules outside of the tests stay below the limit of lines."""
    sizes = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: size for name, size in sizes.items() if size > FILE_LINES_MAX} == {}


def test_every_function_fits_a_screen() -> None:
    """Functions outside of the tests stay below the limit of lines, decorators apart."""
    long = {}
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES_MAX:
                    long[f"{shown(path)}:{node.lineno} {node.name}"] = size
    assert long == {}


def sources() -> list[Path]:
    """Modules that are not tests."""
    return [path for path in files(".py") if not shown(path).startswith("tests/")]


def test_every_event_of_the_log_is_listed_and_used() -> None:
    """Alerts match on the names: what is logged is in the one list, and the list promises nothing that is never logged."""
    listed = {str(event) for event in Event}
    code = [text(shown(path)) for path in (ROOT / "runner").rglob("*.py") if path.name != "logs.py"]
    nouns = "|".join(sorted({name.partition(".")[0] for name in listed}))
    said = {word for source in code for word in re.findall(rf'"((?:{nouns})\.[a-z_]+)"', source)}
    said |= {
        str(event) for event in Event for source in [*code, text("runner/logs.py")] if f"Event.{event.name}" in source
    }
    assert listed - said == set()
    assert {
        word
        for source in code
        for word in re.findall(r'(?:Note|note|info|warning|error)\(\s*"([a-z]+\.[a-z_]+)"', source)
    } <= listed


def test_every_crash_point_has_its_row() -> None:
    """And what docs/reliability.md names as a test is there."""
    page = text("docs/reliability.md")
    points = runner_failpoints.NAMES | runner_failpoints.SHIM_NAMES | plane_failpoints.NAMES
    assert {point for point in points if f"`{point}`" not in page} == set()
    named = set(re.findall(r"`((?:tests|bench|runner|controlplane)/[\w/]+(?:\.py|/))`", page))
    assert {path for path in named if not (ROOT / path).exists()} == set()
