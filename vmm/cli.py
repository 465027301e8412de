"""The `trio-vmm` command."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from vmm.errors import OptionInvalid, VmmError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from vmm.recipe import Recipe
    from vmm.roles import Role


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: the process's own) and return the exit status."""
    from vmm.cli_options import Parser

    given = sys.argv[1:] if arguments is None else arguments
    parser = Parser("trio-vmm", description="A virtual machine monitor for Linux KVM.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser(
        "run", help="run a machine", allow_abbrev=False, description="Run a machine until it ends."
    )
    update = commands.add_parser(
        "update", help="replace the process under a running machine", allow_abbrev=False,
        description="Start a successor for a running machine, hand the guest over, and report the pause.",
    )  # fmt: skip
    migrate = commands.add_parser(
        "migrate", help="move a running machine's guest to another process", allow_abbrev=False,
        description="Move a running machine's guest, and show how far it is; Ctrl-C calls it off.",
    )  # fmt: skip
    save = commands.add_parser(
        "save", help="save a running machine in a file, and end it", allow_abbrev=False,
        description="Save a machine in a file, its RAM where it is if that is a file, and end it; Ctrl-C calls it off.",
    )  # fmt: skip
    resume = commands.add_parser(
        "resume", help="go on with a machine that was saved", allow_abbrev=False,
        description="Go on with the machine in FILE, with its monitors and chardevs; FILE is removed then.",
    )  # fmt: skip
    restore = commands.add_parser(
        "restore", help="start a machine from a file in which it was saved", allow_abbrev=False,
        description="Start the machine in FILE, with the monitors that the options say; FILE stays as it is.",
    )  # fmt: skip
    snapshot = commands.add_parser(
        "snapshot", help="save a running machine's guest under a name, and have it again", allow_abbrev=False,
        description="Snapshots of a running machine, which goes on. Ctrl-C calls off the saving of one.",
    )  # fmt: skip
    stream = commands.add_parser(
        "stream", help="show or compare files in which guests were saved", allow_abbrev=False,
    )  # fmt: skip
    demo = commands.add_parser("demo", help="start a guest and update it live before your eyes", allow_abbrev=False)
    # Only the options of the command that is given: of them all there are a hundred, and each takes its time.
    match given[0] if given else "":
        case "run":
            _add_run(run)
        case "update":
            _add_update(update)
        case "migrate":
            from vmm.cli_migrate import add_migrate_options

            add_migrate_options(migrate)
        case "save":
            save.add_argument("--qmp", required=True, metavar="SOCK", help="the machine's QMP socket")
            save.add_argument("file", metavar="FILE", help="where to; readable by its owner alone")
        case "resume":
            resume.add_argument("file", metavar="FILE", help="what save has written")
            resume.add_argument("--whole", action="store_true", help="load all of its RAM before the guest runs")
            _add_run(resume)
        case "restore":
            restore.add_argument(
                "file", metavar="FILE", help="what migrate has written to a file:, save, or a snapshot"
            )
            restore.add_argument("--whole", action="store_true", help="load all of its RAM before the guest runs")
            _add_run(restore)
        case "snapshot":
            from vmm.cli_snapshot import add_snapshot_options

            add_snapshot_options(snapshot)
        case "stream":
            from vmm.cli_stream import add_stream_options

            add_stream_options(stream)
        case "demo":
            demo.add_argument("--plain", action="store_true", help="no colours")
    options = parser.parse_args(given)
    try:
        match options.command:
            case "run":
                return _run(run, options)
            case "update":
                return _update(options)
            case "migrate":
                from vmm.cli_migrate import migrate_machine

                return migrate_machine(options)
            case "save":
                from vmm.cli_save import save_machine

                return save_machine(options.qmp, options.file)
            case "resume":
                from vmm.cli_resume import resume_machine

                return resume_machine(options.file, options, whole=options.whole)
            case "restore":
                from vmm.cli_resume import restore_machine

                return restore_machine(options.file, options, whole=options.whole)
            case "snapshot":
                from vmm.cli_snapshot import run_snapshot_command

                return run_snapshot_command(options)
            case "stream":
                from vmm.cli_stream import run_stream

                return run_stream(options)
            case "demo":
                from vmm.cli_demo import run_demo

                return run_demo(plain=options.plain)
            case _:
                parser.print_usage(sys.stderr)
                return 1
    except VmmError as error:
        print(f"trio-vmm: {error}", file=sys.stderr)
        return 1


def _add_run(parser: argparse.ArgumentParser) -> None:
    from vmm.cli_options import add_run_options

    add_run_options(parser)


def _add_update(update: argparse.ArgumentParser) -> None:
    update.add_argument("--qmp", required=True, metavar="SOCK", help="the machine's QMP socket")
    update.add_argument("--binary", metavar="PATH", help="the trio-vmm to run as the successor (default: this one)")
    how = update.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only say what the successor would have otherwise")
    how.add_argument("--exec", action="store_true", help="let the process execute the new program; its number stays")
    how.add_argument("--keep", action="store_true", help="leave the old process waiting, for --undo")
    how.add_argument("--undo", action="store_true", help="go back to the process that --keep left waiting")
    how.add_argument("--forget", action="store_true", help="let that process end")
    update.add_argument("--json", action="store_true", help="report as JSON")


def _update(options: argparse.Namespace) -> int:
    if options.exec or options.undo or options.forget:
        from vmm.cli_replace import forget_predecessor, replace_program, undo_update

        if options.exec:
            return replace_program(options.qmp, options.binary, as_json=options.json)
        if options.binary is not None:
            raise OptionInvalid(option="--binary", value=options.binary, wanted="of use here: no program is started")
        if options.undo:
            return undo_update(options.qmp, as_json=options.json)
        return forget_predecessor(options.qmp)
    from vmm.cli_update import check_update, update_machine

    if options.check:
        return check_update(options.qmp, options.binary, as_json=options.json)
    return update_machine(options.qmp, options.binary, keep=options.keep, as_json=options.json)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from vmm.cli_options import defines_machine
    from vmm.cli_recipe import has_monitor, recipe_of, require_precreate
    from vmm.recipe import Recipe

    if "TRIO_VMM_TAKE_BACK" in os.environ:
        from vmm.process import run_process
        from vmm.roles import TakingBack

        # The machine is what it was: what the options say of one is for a start without a guest.
        return run_process(Recipe("of no options", ()), options, os.environ, TakingBack.of(os.environ))
    recipe = recipe_of(options)
    if options.recipe is not None:
        read = _read_recipe(options.recipe)
        if options.precreate:
            require_precreate(read, options.recipe)
        recipe = Recipe(options.recipe, (*recipe, *read))
    if options.print_recipe:
        from vmm.phases.catalog import rank

        print(recipe.ordered(rank), end="")
        return 0
    if not (has_monitor(recipe) or options.recipe):
        complaint = _lacks(options, machine=defines_machine(options))
        if complaint is not None:
            if not defines_machine(options):
                parser.print_usage(sys.stderr)
            print(complaint, file=sys.stderr)
            return 1
    from vmm.process import run_process

    role: Role | None = None
    if options.x_cpr_caretaker_of:
        from vmm.roles import LookingAfter

        role = LookingAfter(options.x_cpr_caretaker_of)
    return run_process(recipe, options, os.environ, role)


def _lacks(options: argparse.Namespace, *, machine: bool) -> str | None:
    """Say what a start without a monitor lacks, if anything."""
    if not machine:
        return "trio-vmm run: nothing to run: give a monitor (-qmp unix:PATH) or a machine (-kernel FILE)"
    comes_in = options.loadvm is not None or (options.incoming and options.incoming != ["defer"])
    if options.kernel is None and not comes_in:
        return "trio-vmm: nothing to boot: give -kernel FILE, or a monitor (-qmp unix:PATH) to go on with"
    return None


def _read_recipe(path: str) -> Recipe:
    from vmm import hostio
    from vmm.recipe import MAX_BYTES, Recipe

    with open(hostio.open_input_file(path), encoding="utf-8", errors="replace") as file:
        return Recipe.parse(path, file.read(MAX_BYTES + 1))
