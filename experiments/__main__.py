"""Command line of the suite: `python -m experiments COMMAND`; each command is a module of `experiments.commands`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from experiments.commands.arguments import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 after a mistake of the user, or results that cannot be shown, and 1 after a failed run, each explained in
        one sentence on stderr; 75 after a signal or a time limit that stopped a run, which is saved: the same command
        goes on; 130 after Ctrl-C and 143 after SIGTERM outside of a run.
    """
    options = make_parser().parse_args(arguments)
    try:
        with _sigterm_interrupts():
            code = import_module(f"experiments.commands.{options.command}").main(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("interrupted: finished runs are kept; the same command goes on with the others", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    return int(code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the command as Ctrl-C does."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Turns SIGTERM into an interrupt, so that workers end too; not in a thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a locale may lack letters of labels
    code = main()
    departure = sys.modules.get("experiments.distributed.departure")  # without it there is no process group to leave
    if departure is not None:
        departure.leave(code)
    sys.exit(code)
