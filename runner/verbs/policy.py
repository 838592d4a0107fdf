"""`runner policy`: what may be asked of this machine, whatever is signed."""

from pathlib import Path

import click

from runner.render import complain
from runner.verbs.options import ExitCode, roots_option, settings_of
from terminal.options import as_json
from terminal.printing import print_facts, print_json


@click.group(short_help="Write and show what commands may do here.")
def policy() -> None:
    """Write the policy that limits what commands may do here, and show how it is read.

    \b
    Examples:
      runner policy init --root ~/src
      runner policy show
    """


@policy.command()
@roots_option
@click.pass_context
def init(ctx: click.Context, roots: tuple[str, ...]) -> None:
    """Write a commented policy file; one that is there is kept.

    \b
    Example:
      runner policy init --root ~/src --root /data/repos
    """
    from runner.adapters.policyfile import write_default

    file = settings_of(ctx).policy_file
    write_default(file, roots or (str(Path.home()),))
    click.echo(f"{file} written; the daemon reads it when it starts")


@policy.command()
@as_json
@click.pass_context
def show(ctx: click.Context, as_json: bool) -> None:
    """Print the policy as the daemon reads it. Exit status 3 when it cannot be read: then nothing is admitted.

    \b
    Example:
      runner policy show --json
    """
    from runner.adapters.policyfile import load_policy

    file = settings_of(ctx).policy_file
    known, problem = load_policy(file, ())
    if problem is not None:
        complain(problem, f"${{EDITOR:-vi}} {file}" if file.exists() else "runner policy init")
        ctx.exit(ExitCode.CONFIG)
    found = {
        "file": str(file),
        "digest": known.digest,
        "kinds": sorted(known.kinds),
        "roots": list(known.roots),
        "env_allow": list(known.env_allow),
        "env_deny": list(known.env_deny),
        "concurrent_max": known.concurrent_max,
        "grace_ms_max": known.grace_ms_max,
        "disk_free_min": known.disk_free_min,
        "disk_free_percent_min": known.disk_free_percent_min,
        "inodes_free_percent_min": known.inodes_free_percent_min,
        "memory_available_min": known.memory_available_min,
        "fds_free_min": known.fds_free_min,
        "outlive": list(known.outlive),
        "on_daemon_stop": known.on_daemon_stop,
    }
    if as_json:
        print_json(found)
    else:
        print_facts(
            [(name, " ".join(value) if isinstance(value, list) else str(value)) for name, value in found.items()]
        )
