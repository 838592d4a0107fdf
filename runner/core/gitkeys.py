"""Which keys a repository's own configuration may hold before we run git in it.

An allow-list: git grows new keys that start programs faster than anyone could deny them. Only names are judged, never values, and
only for the verbs of runner/adapters/git.py. A key is here because it is harmless in itself, because every call overrides it
(`core.hooksPath`, `core.fsmonitor`), or because none of our verbs ever reads it (`alias.*`, `core.sshCommand`, `credential.*`);
tests/unit/runner/test_git_hostile.py holds a canary for each of the latter two kinds. What is missing on purpose: `filter.*` and
`include*` (a checkout obeys them), `core.worktree` (writes elsewhere, and no override stops it), `diff.*.{command,textconv}`,
`merge.*.driver`, `remote.*.{uploadpack,receivepack,vcs,promisor}`, `protocol.*`, and formats we cannot read.
"""

import re
from collections.abc import Collection, Iterable
from typing import Final

_PLAIN: Final = frozenset(
    [
        "core.repositoryformatversion",
        "core.bare",
        "core.filemode",
        "core.logallrefupdates",
        "core.ignorecase",
        "core.autocrlf",
        "core.eol",
        "core.safecrlf",
        "core.symlinks",
        "core.precomposeunicode",
        "core.quotepath",
        "core.compression",
        "core.loosecompression",
        "core.bigfilethreshold",
        "core.packedgitlimit",
        "core.packedgitwindowsize",
        "core.deltabasecachelimit",
        "core.abbrev",
        "core.sharedrepository",
        "core.sparsecheckout",
        "core.sparsecheckoutcone",
        "core.splitindex",
        "core.untrackedcache",
        "core.preloadindex",
        "core.trustctime",
        "core.checkstat",
        "core.fscache",
        "core.longpaths",
        "core.hidedotfiles",
        "core.protecthfs",
        "core.protectntfs",
        "core.commitgraph",
        "core.multipackindex",
        "core.fsync",
        "core.fsyncmethod",
        "core.whitespace",
        "core.commentchar",
        "core.notesref",
        "core.warnambiguousrefs",
        "core.attributesfile",
        "core.excludesfile",
        "core.hookspath",
        "core.fsmonitor",
        "core.sshcommand",
        "core.editor",
        "core.pager",
        "core.askpass",
        "extensions.worktreeconfig",
        "extensions.preciousobjects",
        "extensions.noop",
        "extensions.relativeworktrees",
        "commit.gpgsign",
        "commit.template",
        "commit.verbose",
        "commit.cleanup",
        "tag.gpgsign",
        "tag.sort",
        "gpg.format",
        "gpg.program",
        "checkout.defaultremote",
        "checkout.guess",
        "checkout.workers",
        "checkout.thresholdforparallelism",
        "clone.defaultremotename",
        "diff.algorithm",
        "diff.renames",
        "diff.renamelimit",
        "diff.mnemonicprefix",
        "diff.noprefix",
        "diff.colormoved",
        "diff.submodule",
        "diff.context",
        "diff.wserrorhighlight",
        "diff.indentheuristic",
        "diff.tool",
        "diff.guitool",
        "diff.ignoresubmodules",
        "merge.ff",
        "merge.conflictstyle",
        "merge.renames",
        "merge.renamelimit",
        "merge.log",
        "merge.tool",
        "merge.guitool",
        "merge.stat",
        "sequence.editor",
        "submodule.active",
        "submodule.fetchjobs",
        "lfs.repositoryformatversion",
        "lfs.url",
        "lfs.pushurl",
        "lfs.concurrenttransfers",
        "lfs.locksverify",
    ]
)
"""Whole names without a subsection."""

_IN_SUBSECTION: Final = frozenset(
    [
        "remote.url",
        "remote.pushurl",
        "remote.fetch",
        "remote.push",
        "remote.tagopt",
        "remote.prune",
        "remote.prunetags",
        "remote.mirror",
        "remote.skipdefaultupdate",
        "remote.skipfetchall",
        "remote.followremotehead",
        "remote.gh-resolved",
        "remote.lfsurl",
        "branch.remote",
        "branch.pushremote",
        "branch.merge",
        "branch.rebase",
        "branch.description",
        "branch.mergeoptions",
        "branch.vscode-merge-base",
        "branch.gh-merge-base",
        "branch.github-pr-owner-number",
        "branch.github-pr-base-branch",
        "submodule.url",
        "submodule.active",
        "submodule.branch",
        "submodule.fetchrecursesubmodules",
        "submodule.ignore",
        "url.insteadof",
        "url.pushinsteadof",
        "lfs.access",
        "lfs.locksverify",
        "difftool.prompt",
        "mergetool.keepbackup",
    ]
)
"""`section.key` of names that have a subsection between the two."""

_WHOLE_SECTIONS: Final = frozenset(
    [
        "user",
        "author",
        "committer",
        "init",
        "gc",
        "pack",
        "index",
        "advice",
        "color",
        "column",
        "push",
        "pull",
        "fetch",
        "status",
        "log",
        "blame",
        "branch",
        "rebase",
        "rerere",
        "receive",
        "repack",
        "fsck",
        "feature",
        "help",
        "format",
        "versionsort",
        "worktree",
        "notes",
        "apply",
        "grep",
        "http",
        "https",
        "credential",
        "alias",
        "gui",
        "gitk",
        "maintenance",
        "stash",
        "transfer",
        "am",
        "mailmap",
    ]
)
"""Sections whose every key, with or without a subsection, is harmless to our verbs: they neither fetch, commit, log nor show."""

_NEVER_READ: Final = frozenset({"alias", "credential"})
"""Sections full of programs that a builtin command without a network never looks at."""
_STARTS_PROGRAM: Final = re.compile(r"(hook|command|cmd|program|helper|driver|process)$")
"""What git calls keys that start something: not trusted even in a harmless section."""
_SUBSECTION_ONLY: Final = frozenset({"remote", "branch", "submodule", "url"})
"""Sections whose subsections are judged key by key even where plain keys of the section are free."""


def first_hostile(names: Iterable[str], allow_filters: Collection[str] = ()) -> str | None:
    """The first configuration key that may not be there, as git names it; None when all are harmless.

    `allow_filters` are content filters (`filter.<name>.*`) that the machine's owner vouches for.
    """
    return next((name for name in names if not _is_harmless(name, allow_filters)), None)


def _is_harmless(name: str, allow_filters: Collection[str]) -> bool:
    section, dot, rest = name.partition(".")
    subsection, inner_dot, key = rest.rpartition(".")
    if not dot:
        return False
    # git prints section and key in lower case; a subsection is kept as it is.
    if section == "filter":
        return bool(inner_dot) and subsection in allow_filters
    if section in _SUBSECTION_ONLY:
        return f"{section}.{key}" in _IN_SUBSECTION if inner_dot else section in _WHOLE_SECTIONS
    if section in _WHOLE_SECTIONS:
        return section in _NEVER_READ or not _STARTS_PROGRAM.search(key)
    return f"{section}.{key}" in _IN_SUBSECTION if inner_dot else name in _PLAIN
