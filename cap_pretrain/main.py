"""python -m cap_pretrain.main --config=configs/NAME.py[:key=value,…] --workdir=DIR

Any field of the config is set with `--config.some.field=value`. Run again with the same workdir, it
goes on where it stopped. `--dry_run` writes WORKDIR/plan.json and prints it.

Exit status: 0 done, 2 the user's mistake, 143 stopped by SIGTERM after saving, 130 by Ctrl-C, 75
another host of the cluster is lost (start again).
"""

import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from cap_pretrain.errors import UserError, did_you_mean, disk_error

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:key=value,…]")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: everything it writes.")
ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes", [], "Fields in which --config may differ from the one the run began with."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where the cluster is not recognised."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only plan: sizes, arithmetic, memory.")


def parse(argv: list[str]) -> list[str]:
    """Parses the command line, with mistakes told as the user's."""
    logging.set_verbosity(logging.WARNING)  # libraries need not tell; --verbosity=0 lets them
    for arg in argv:
        if arg.startswith("--config="):
            file = arg.removeprefix("--config=").split(":")[0]
            if not Path(file).is_file():
                near = did_you_mean(file, map(str, Path("configs").glob("*.py")))
                raise UserError(f"--config: there is no file {file!r}.{near}")
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
        near = did_you_mean(e.flagname, ("config", "workdir", "allow_changes", "dry_run"))
        raise UserError(f"--{e.flagname}: there is no such flag.{near}") from e
    except flags.Error as e:
        lines = [line for line in str(e).splitlines() if line.strip()]
        # A config file that fails gives its traceback; what counts is in its last line.
        raise UserError(" ".join([lines[0], *lines[1:][-1:]])) from e
    except (AttributeError, KeyError) as e:  # from the locked config
        message = e.args[0]
        while isinstance(message, Exception):
            message = message.args[0]
        name, _, hint = str(message).partition("\n")
        raise UserError(f"--config: no field {name}. {hint}".rstrip()) from e
    except (TypeError, ValueError) as e:
        raise UserError(f"--config: {str(e).splitlines()[0]}") from e
    if CONFIG.value is None or not WORKDIR.value:
        missing = "--config" if CONFIG.value is None else "--workdir"
        raise UserError(f"{missing} is missing; say --config=configs/NAME.py --workdir=DIR.")
    if "://" in WORKDIR.value:
        raise UserError(
            f"--workdir: {WORKDIR.value} is a URL; give a folder, such as one of a file system "
            "that is mounted (data is read from URLs, see docs/tpu_pod.md)."
        )
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; write --config.some.field=value.")
    return rest


def main(_: list[str]) -> None:
    """Dispatches, after the flags are parsed."""
    from cap_pretrain import train
    from cap_pretrain.distributed import cluster, determinism, heartbeat

    determinism.set_environment(CONFIG.value)
    workdir = Path(WORKDIR.value)
    if DRY_RUN.value:
        print(train.dry_run(CONFIG.value, workdir))
        return
    cluster.start(cluster.Addresses(COORDINATOR.value, PROCESSES.value, PROCESS.value))
    with heartbeat.watched():
        train.run(CONFIG.value, workdir, ALLOW_CHANGES.value)


def entry() -> int:
    """Runs `main` and turns its ends into exit codes."""
    try:
        app.run(main, flags_parser=parse)
    except UserError as e:
        return say(e, 2)
    except OSError as e:
        reason = disk_error(e)
        if not reason:
            raise
        where = f"{e.filename}: " if e.filename else ""
        return say(f"{where}{reason}. Mend that and run again: the checkpoints are intact.", 2)
    except KeyboardInterrupt:
        return say("interrupted before the first step of this start; nothing is lost.", 130)
    except SystemExit as e:  # as app.run always ends
        return e.code or 0
    except Exception as e:
        if not hasattr(e, "exit_code"):  # of watch.Stopped, which is not imported for a mistake
            raise
        return say(e, e.exit_code)


def say(message: object, code: int) -> int:
    """Tells why the program ends; returns the exit code."""
    print(f"cap_pretrain: {message}", file=sys.stderr)
    return code


def leave() -> NoReturn:
    """Runs `entry` and ends the process with its exit code."""
    try:
        code = entry()
    except Exception:
        traceback.print_exc()
        code = 1
    heartbeat = sys.modules.get("cap_pretrain.distributed.heartbeat")  # not imported for a mistake
    (heartbeat.leave if heartbeat else sys.exit)(code)


if __name__ == "__main__":
    leave()
