"""The command line of a run: `python -m cap_pretrain.main --config=configs/NAME.py --workdir=DIR`.

`--config=FILE:key=value,…` passes arguments to the config file, and `--config.some.field=value`
sets any field. Starting again with the same workdir resumes the run. `--dry_run` writes
WORKDIR/plan.json and prints it.

Exit status: 0 done; 2 a mistake of the user; 143 stopped by SIGTERM after saving, 130 by Ctrl-C; 75
another host of the cluster is lost, or a bucket out of reach (start again).
"""

import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from cap_pretrain import files, untrusted
from cap_pretrain.cli import config_files
from cap_pretrain.errors import UserError, did_you_mean, disk_error
from cap_pretrain.telemetry import console


class _Parser(flags.ArgumentParser):
    """Parses --config; `config` is the one that it made, also if one of the fields is wrong."""

    config: ConfigDict | None = None

    def parse(self, argument: str) -> ConfigDict:
        self.config = None
        self.config = config_files.config(argument).lock()
        return self.config


CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:key=value,…]")
PARSER = flags.FLAGS["config"].parser = _Parser()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of everything that the run writes, or gs://BUCKET/FOLDER."
)
ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes", [], "Fields in which --config may differ from the config of the earlier start."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where the cluster is not recognized."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the cluster.")
PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only write the plan: sizes, FLOPs, memory.")


def parse(argv: list[str]) -> list[str]:
    """Return the arguments that are left after the flags; raise UserError if a flag is wrong."""
    logging.set_verbosity(logging.WARNING)  # of libraries; --verbosity=0 shows more
    if {"-h", "--help"} & set(argv[1:]):
        print(usage())
        sys.exit(0)
    argv = [_with_file(arg) for arg in _joined(argv)]
    file = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), "")
    try:
        with console.doing(f"Loading JAX and {file}", say=False):
            rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise config_error(e, argv) from e
    if CONFIG.value is None or not WORKDIR.value:
        missing = "--config" if CONFIG.value is None else "--workdir"
        raise UserError(f"{missing} is missing; give --config=configs/NAME.py --workdir=DIR.")
    workdir()
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; write --config.some.field=value.")
    return rest


def workdir() -> Path:
    """Return the path that --workdir gives, which `parse` requires; may raise UserError."""
    try:
        return files.place(WORKDIR.value or "")
    except UserError as e:
        raise UserError(f"--workdir: {e}") from e


def usage(about: str = __doc__) -> str:
    """Return the text of --help: what the program does, the flags and the configs."""
    lines = [about.rstrip(), "", "Flags:"]
    known = (CONFIG, WORKDIR, ALLOW_CHANGES, DRY_RUN, COORDINATOR, PROCESSES, PROCESS)
    lines += [f"  --{flag.name:20}  {flags.FLAGS[flag.name].help}" for flag in known]
    lines += ["", "Configs (`cap configs` has their arguments, `cap fields` all fields):"]
    lines += [f"  {found.path.stem:16}  {found.purpose}" for found in config_files.listed()]
    return "\n".join(lines)


def _joined(argv: Iterable[str]) -> Iterator[str]:
    """Yield the arguments of the program with `--config FILE` as --config=FILE."""
    rest = iter(argv)
    for arg in rest:
        value = next(rest, None) if arg in ("--config", "-config") else None
        yield arg if value is None else f"--config={value}"


def _with_file(arg: str) -> str:
    """Return an argument of the program with the file that --config=NAME[:key=value,…] means."""
    flag, equals, value = arg.partition("=")
    if flag not in ("--config", "-config") or not equals:
        return arg
    name, colon, rest = value.partition(":")
    try:
        return f"--config={config_files.find(name)}{colon}{rest}"
    except UserError as error:
        raise UserError(f"--config: {error}") from error


def config_error(error: Exception, argv: Sequence[str] = ()) -> UserError:
    """Return the message for an exception that the parsing of flags in `argv` raised."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = did_you_mean(error.flagname, ("config", "workdir", "allow_changes", "dry_run"))
        return UserError(f"--{error.flagname}: there is no such flag.{near}")
    if isinstance(error, flags.Error):
        lines = [line for line in str(error).splitlines() if line.strip()]
        # A config file that fails brings its traceback; the last line says why.
        return UserError(" ".join([lines[0], *lines[1:][-1:]]))
    if isinstance(error, AttributeError | KeyError):  # from the locked config, wrapped or not
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        name, _, hint = str(error.args[0]).partition("\n")
        hint = f"{hint}{_where(argv)}".strip() or "`cap fields` lists all fields."
        return UserError(f"--config: no field {name}. {hint}")
    return UserError(f"--config: {str(error).splitlines()[0]}")


def _where(argv: Sequence[str]) -> str:
    """Return a hint where the first field in `argv` is that the config does not have."""
    from cap_pretrain.cli import documentation

    given = [arg[9:].partition("=")[0] for arg in argv if arg.startswith("--config.")]
    return documentation.where(given, PARSER.config) if PARSER.config is not None else ""


def main(_: list[str]) -> None:
    """Run the program after the flags are parsed."""
    with console.doing("Loading the training loop", say=False):
        from cap_pretrain.distributed import cluster, determinism, gpu, heartbeat
        from cap_pretrain.train import dry_run, run

    determinism.set_environment(CONFIG.value)
    gpu.set_environment()
    given = tuple(config_flags.get_override_values(flags.FLAGS["config"]))
    if DRY_RUN.value:
        console.say(dry_run(CONFIG.value, workdir(), ALLOW_CHANGES.value, given))
        return
    with console.doing("Joining the cluster", say=False):
        cluster.start(cluster.Addresses(COORDINATOR.value, PROCESSES.value, PROCESS.value))
    with heartbeat.watched():
        run(CONFIG.value, workdir(), ALLOW_CHANGES.value, given)


def entry() -> int:
    """Run `main` and return the exit status."""
    try:
        with console.used():
            app.run(main, flags_parser=parse)
    except UserError as e:
        return say(e, 2)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        reason = disk_error(e)
        if not reason and files.is_url(str(e.filename)):
            return say(f"{where}{e.strerror}; start again when the bucket can be reached.", 75)
        if not reason:
            raise
        saved: object = None
        with contextlib.suppress(OSError):  # perhaps that folder is what cannot be read
            saved = files.numbered(workdir() / "checkpoints")
        left = ": the checkpoints are intact" if saved else ""
        return say(f"{where}{reason}. Fix this and start again{left}.", 2)
    except KeyboardInterrupt:
        return say("interrupted before the first step of this start; nothing is lost.", 130)
    except SystemExit as e:  # as app.run always ends
        return int(e.code or 0)
    except Exception as e:
        if not hasattr(e, "exit_code"):  # watch.Stopped has one; a mistake must not import it
            raise
        return say(e, e.exit_code)


def say(message: object, code: int) -> int:
    """Print why the program ends; return the exit status."""
    text = untrusted.printable(str(message), keep="\n")
    print(f"cap_pretrain: {text}", file=sys.stderr)
    return code


def leave() -> NoReturn:
    """Run `entry` and end the process with its exit status."""
    try:
        code = entry()
    except Exception:
        traceback.print_exc()
        code = 1
    heartbeat = sys.modules.get("cap_pretrain.distributed.heartbeat")  # only imported by a run
    if heartbeat:
        heartbeat.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    leave()
