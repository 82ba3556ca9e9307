"""The command ``supervise-core``: which backends there are, and what is in a log directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from supervise_core.errors import SuperviseError
from supervise_core.plugins import list_backends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0 if all is well, 1 if not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="supervise-core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    backends = commands.add_parser("backends", help="list the backends, and what to type for those that lack something")
    backends.set_defaults(run=lambda _: _backends())
    checkpoints = commands.add_parser("checkpoints", help="list the checkpoints of a log directory")
    checkpoints.add_argument("logdir")
    checkpoints.add_argument("--basename", default="model.ckpt")
    checkpoints.add_argument("--verify", action="store_true", help="read everything and check every hash")
    checkpoints.set_defaults(run=lambda options: _checkpoints(options.logdir, options.basename, options.verify))
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (SuperviseError, OSError) as error:
        print(f"supervise-core: {error}", file=sys.stderr)
        return 1


def _backends() -> int:
    for entry in list_backends():
        target = "" if entry.info is None else entry.info.target.replace(":", ".")
        state = "usable" if entry.usable else "not usable"
        print(f"{entry.name:12} {state:12} {target or '-':32} from {entry.distribution}")
        if entry.problem:
            print(f"{'':12} {entry.problem}")
    return 0


def _checkpoints(logdir: str, basename: str, verify: bool) -> int:
    import datetime

    from supervise_core.reading import CheckpointDirectory  # listing the backends must not cost its import

    directory = CheckpointDirectory(logdir, basename)
    if not directory.path.is_dir():
        raise FileNotFoundError(f"there is no directory {logdir}")
    steps = directory.steps()
    good = True
    for step in steps:
        with directory.at(step) as checkpoint:
            try:
                manifest = checkpoint.manifest()
                if verify:
                    checkpoint.verify()
            except SuperviseError as error:
                good = False
                print(f"{checkpoint.path.name:24} DAMAGED: {error}")
                continue
        size = sum(record.size for record in manifest.files.values())
        when = datetime.datetime.fromtimestamp(manifest.wall_time).astimezone().isoformat(" ", "seconds")
        metrics = " ".join(f"{name}={value:g}" for name, value in manifest.metrics.items())
        checked = " verified" if verify else ""
        print(f"{checkpoint.path.name:24} {when}  {size:>14,} bytes  {manifest.backend}{checked} {metrics}".rstrip())
    for name, reason in directory.set_aside().items():
        good = False
        print(f"{name:24} SET ASIDE: {reason}")
    if not steps:
        print(f"no checkpoints in {logdir}")
    return 0 if good else 1
