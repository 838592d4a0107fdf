"""`runner doctor`: is all well on this machine."""

import click

from runner.errors import ConfigError
from runner.render import COLOURS
from runner.verbs.options import ExitCode, settings_of
from terminal.options import as_json
from terminal.printing import print_json


@click.command()
@click.option("--only", multiple=True, metavar="ID", help="Only this check; may be given more than once.")
@as_json
@click.pass_context
def doctor(ctx: click.Context, only: tuple[str, ...], as_json: bool) -> None:
    """Check everything the runner needs. Nothing is changed; each finding names the command that helps.

    Exit status 0 when all is well, 8 with warnings, 9 with failures.

    \b
    Examples:
      runner doctor
      runner doctor --only R008 --only R003
      runner doctor --json | jq '.findings[] | select(.verdict != "ok")'
    """
    from protocol.text import visible
    from runner.checks import CHECKS as OWN
    from runner.daemon_checks import CHECKS as DAEMON
    from runner.doctor import Check, Scene, Verdict, examine
    from runner.machine_checks import CHECKS as MACHINE

    known: tuple[Check, ...] = (*OWN, *MACHINE, *DAEMON)
    unknown = [name for name in only if name not in {check.id for check in known}]
    if unknown:
        raise click.BadParameter(f"{unknown[0]}: there are {known[0].id} to {known[-1].id}", param_hint="--only")
    try:
        scene = Scene(settings_of(ctx))
    except ConfigError as exc:
        # Without settings there is one thing to say, and nothing else can be looked at.
        scene, known = Scene(None, exc), known[:1]
    findings = []
    for finding in examine(scene, [check for check in known if not only or check.id in only or scene.found is None]):
        findings.append(finding)
        if not as_json:
            click.echo(
                f"{click.style(finding.verdict.ljust(4), fg=COLOURS[finding.verdict])}  {finding.id}  "
                f"{finding.title}: {visible(finding.measured)}"
            )
            if finding.fix:
                click.echo(f"            fix: {visible(finding.fix)}")
    verdicts = {finding.verdict for finding in findings}
    if as_json:
        worst = next((v for v in (Verdict.FAIL, Verdict.WARN) if v in verdicts), Verdict.OK)
        print_json({"verdict": worst, "findings": [finding._asdict() for finding in findings]})
    if Verdict.FAIL in verdicts:
        ctx.exit(ExitCode.DOCTOR_FAILURES)
    ctx.exit(ExitCode.DOCTOR_WARNINGS if Verdict.WARN in verdicts else ExitCode.OK)
