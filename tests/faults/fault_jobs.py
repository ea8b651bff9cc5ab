"""Jobs that faults happen to: the suite's command in real processes, started again and again on one output folder.

`python -m fault_jobs` is `python -m experiments` with the faults and the diary that the variable INSTRUCTIONS asks for:
they are injected here, and the suite knows nothing of them. The processes of a job are forked from a server that has
imported torch already, so that one starts within milliseconds. No launcher stands behind them: ranks that are left over
must end by themselves.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import launched
import numpy as np
import torch
import torch.distributed as dist
from digests import digest
from system_calls import meet_points

from aadl.decisions import Decisions
from data_loaders.imagenet.reading import Reader
from experiments.__main__ import main
from experiments.distributed.departure import leave
from experiments.records.reading import read_run
from experiments.runs import checkpoint
from experiments.runs.session import RunSession
from experiments.training import train
from experiments.training.train import Training

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support", HERE)))
"""Where the processes of a job find the suite and the modules of the tests."""
INSTRUCTIONS = "AADL_FAULTS"
LONGEST_SECONDS = 300.0
"""A job that lasts longer has failed to end."""
STATE_OF_THE_END = ("model", "stages", "plan", "average", "updates", "problem", "num_steps", "interval")
"""Parts of a run's state that must repeat bit for bit; the others are times, and series, which are compared apart."""


@dataclass(frozen=True)
class Fault:
    """What happens once to the process of a rank, or of all for -1, not before so many steps: a signal, or an action of
    `_Injector`. Places are "step" (before it), "validation", "acceleration", "worker" (of data), "gathering" (the state
    of all ranks, during a save), and `system_calls.POINTS`; attempts are those of torchrun.
    """

    action: str
    place: str = "step"
    step: int = 0
    rank: int = 0
    attempt: int = 0


# ---- in the process --------------------------------------------------------------------------------------------------


class _Injector:
    """Keeps the diary of this process, one line an event, and lets the faults happen."""

    def __init__(self, diary: str, faults: Sequence[Mapping[str, Any]], pace: float, rows: bool, ballast: str) -> None:
        self._diary, self._pace, self._rows, self._ballast = diary, pace, rows, ballast
        self._rank = int(os.environ.get("RANK", os.environ.get("PMI_RANK", "0")))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._left = [Fault(**fault) for fault in faults]
        self._left = [f for f in self._left if f.rank in (-1, self._rank) and f.attempt == attempt]
        self._steps = 0
        self._run: Training | None = None

    def note(self, what: str, **more: Any) -> None:
        entry = {"what": what, "rank": self._rank, "step": self._steps, "time": time.monotonic(), **more}
        handle = os.open(self._diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, json.dumps(entry).encode() + b"\n")
        os.close(handle)

    def meet(self, place: str) -> bool:
        """Lets the faults of a place happen; whether what follows is left out."""
        omitted = False
        for fault in [fault for fault in self._left if fault.place == place and fault.step <= self._steps]:
            self._left.remove(fault)
            self.note("fault", action=fault.action)
            if hasattr(signal, fault.action):
                os.kill(os.getpid(), getattr(signal, fault.action))
            else:
                omitted |= bool(getattr(self, f"_{fault.action}")())
        return omitted

    def _hang(self) -> None:
        time.sleep(10 * LONGEST_SECONDS)

    def _raise_memory_error(self) -> NoReturn:
        raise MemoryError("as if there were none left")

    def _raise_in_worker(self) -> NoReturn:
        raise ZeroDivisionError("in a worker")

    def _skip_step(self) -> bool:
        return True

    def _decide_otherwise(self) -> None:
        assert self._run is not None
        self._run.closure.num_losses += 1

    def _send_another_shape(self) -> None:
        dist.all_reduce(torch.zeros(3))

    def _fill_disk(self) -> None:
        with open(self._ballast, "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass

    def patch(self) -> None:
        """Puts the diary and the faults around the suite's functions, in this process."""
        step, result, restore, save = Training.take_step, Training.result, RunSession.restore, RunSession.save
        evaluate, accelerate = train.evaluate, Decisions.accelerate
        read, on_cpu = Reader.__getitem__, checkpoint.on_cpu

        def stepping(run: Training, batch: Any) -> None:
            self._run, self._steps = run, run.num_steps
            if self.meet("step"):
                return
            step(run, batch)
            self._steps = run.num_steps
            self.note("step", **({"rows": _checksums(batch), "epoch": run.interval} if self._rows else {}))
            time.sleep(self._pace)

        def ending(run: Training, *, finished: bool, weights: bool = False) -> Any:
            if finished:
                state = run.state()[0]
                self.note("end", digest=digest({name: state[name] for name in STATE_OF_THE_END}))
            return result(run, finished=finished, weights=weights)

        def restoring(session: RunSession, run: Training) -> bool:
            restored = restore(session, run)
            self._steps = run.num_steps
            self.note("restored", digest=digest(run.state()[0]["model"]) if restored else "")
            return restored

        def saving(session: RunSession, run: Training, **more: Any) -> None:
            self.note("save")
            save(session, run, **more)
            self.note("saved")

        def evaluating(*arguments: Any) -> Any:
            self.meet("validation")
            return evaluate(*arguments)

        def accelerating(decisions: Decisions, *arguments: Any) -> None:
            self.meet("acceleration")
            accelerate(decisions, *arguments)

        def gathering(*arguments: Any, **options: Any) -> Any:
            self.meet("gathering")
            return on_cpu(*arguments, **options)

        def reading(reader: Any, key: Any) -> Any:
            if key.epoch is not None and key.epoch > 1:
                self.meet("worker")
            return read(reader, key)

        replacements: dict[tuple[Any, str], Any] = {
            (Training, "take_step"): stepping,
            (Training, "result"): ending,
            (RunSession, "restore"): restoring,
            (RunSession, "save"): saving,
            (train, "evaluate"): evaluating,
            (Decisions, "accelerate"): accelerating,
            (checkpoint, "on_cpu"): gathering,
            (Reader, "__getitem__"): reading,
        }
        for (owner, name), function in replacements.items():
            setattr(owner, name, function)
        meet_points(self.meet)


def _checksums(batch: Any) -> list[int]:
    """A number for each row of a batch."""
    return [zlib.crc32(row.contiguous().numpy().tobytes()) for row in batch[0].cpu()]


def run_command(arguments: Sequence[str]) -> NoReturn:
    """The suite's command, with what INSTRUCTIONS asks for."""
    injector = _Injector(**json.loads(os.environ[INSTRUCTIONS]))
    injector.patch()
    multiprocessing.set_start_method("fork", force=True)  # workers of data inherit what was patched
    injector.note("begin")
    leave(main(arguments))


# ---- processes -------------------------------------------------------------------------------------------------------


def start_server() -> None:
    """Waits until processes start quickly, so that no time that is measured holds the start of the server."""
    # Commands import what they need when they run.
    commands = ["experiments.catalog", "experiments.distributed.process_group", "experiments.runs.execute"]
    kinds = ["experiments.admissions.experiment", "experiments.images.experiment", "experiments.pinn.experiment"]
    launched.start_server("fault_jobs", *commands, *kinds)
    process = launched.CONTEXT.Process(target=launched.clean_environment)
    process.start()
    process.join()


def _become(arguments: Sequence[str], variables: Mapping[str, str], log: str) -> NoReturn:
    """In the new process: becomes one of the job's."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    launched.begin(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run_command(arguments)


def _end_with_parent() -> None:
    """No job outlives the one who started it, whatever became of that."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


class Hung(Exception):
    """A job did not end."""


@dataclass
class Ended:
    """What a job left: exit codes by rank (that of a signal is negative), times, and what its processes wrote."""

    codes: list[int]
    start: float
    end: float
    log: str
    diary: list[dict[str, Any]] = field(repr=False)

    def entries(self, what: str, rank: int | None = None) -> list[dict[str, Any]]:
        return [entry for entry in self.diary if entry["what"] == what and rank in (None, entry["rank"])]

    @property
    def restored(self) -> int:
        """Step from which it went on; -1 if it did not come so far."""
        return min((int(entry["step"]) for entry in self.entries("restored")), default=-1)

    @property
    def saved(self) -> int:
        """The last step that rank 0 has saved, 0 if there is none."""
        return max((int(entry["step"]) for entry in self.entries("saved", 0)), default=0)

    @property
    def reached(self) -> int:
        """The last step of all ranks."""
        return max((int(entry["step"]) for entry in self.entries("step")), default=max(self.restored, 0))

    def tail(self) -> str:
        """The end of the log, in one line, for a message."""
        return " | ".join(self.log.strip().splitlines()[-3:])[-400:]


class Job:
    """One start of the command; its processes are its own session each, so that their workers end with them."""

    def __init__(self, processes: Sequence[BaseProcess], log: Path, diary: Path) -> None:
        self._processes, self._log, self._diary = list(processes), log, diary
        self.start = time.monotonic()
        for process in self._processes:
            process.start()

    def diary(self) -> list[dict[str, Any]]:
        """What was written so far; a line that is being written is left out."""
        text = self._diary.read_text() if self._diary.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, what: str, count: int = 1, seconds: float = LONGEST_SECONDS) -> bool:
        """Waits for entries of the diary; False if the job ended without them."""
        end = time.monotonic() + seconds
        while sum(entry["what"] == what for entry in self.diary()) < count:
            if not self.lives:
                return sum(entry["what"] == what for entry in self.diary()) >= count
            if time.monotonic() > end:
                self.kill()
                raise Hung(f"there was no {what} within {seconds:g} s")
            time.sleep(0.01)
        return True

    @property
    def lives(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def send(self, number: int, rank: int | None = None, *, with_workers: bool = False) -> None:
        """Signals a rank, all of them if it is None."""
        for process in self._processes if rank is None else self._processes[rank : rank + 1]:
            if process.pid is not None and process.is_alive():
                (os.killpg if with_workers else os.kill)(process.pid, number)

    def kill(self) -> None:
        """Kills all processes, those of data as well."""
        self.send(signal.SIGKILL, with_workers=True)
        for process in self._processes:
            process.join()

    def wait(self, seconds: float = LONGEST_SECONDS) -> Ended:
        """Waits for all processes, and kills those that do not end in time."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        ended = time.monotonic()
        if self.lives:
            self.kill()
            raise Hung(f"the job did not end within {seconds:g} s: {self.result(ended).tail()}")
        return self.result(ended)

    def result(self, ended: float) -> Ended:
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        return Ended([int(process.exitcode or 0) for process in self._processes], self.start, ended, log, self.diary())


class Place:
    """An output folder, and the command that is started on it again and again."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, results: Path | None = None) -> None:
        self.folder, self.results = folder, results or folder / "results"
        folder.mkdir(parents=True)
        self._numbers = itertools.count(1)
        self.configure(config)

    def configure(self, config: Mapping[str, Any]) -> None:
        self.config = self.folder / "config.yaml"
        self.config.write_text(json.dumps(config))  # which is YAML, too

    @property
    def arguments(self) -> list[str]:
        """Of the command."""
        return ["run", str(self.config), "--results", str(self.results), "--jobs", "1"]

    def instructions(self, diary: Path, faults: Sequence[Fault], **more: Any) -> dict[str, str]:
        """Variable for the processes of a job."""
        options = {"pace": 0.0, "rows": False, "ballast": "", **more}
        return {INSTRUCTIONS: json.dumps({"diary": str(diary), "faults": [asdict(f) for f in faults], **options})}

    def files(self) -> tuple[Path, Path]:
        """Log and diary for the next start."""
        number = next(self._numbers)
        return self.folder / f"start-{number}.log", self.folder / f"start-{number}.jsonl"

    def start(self, *faults: Fault, ranks: int = 1, **more: Any) -> Job:
        """Starts the command, on ranks that find each other as those of mpiexec do; more are options of `_Injector`."""
        log, diary = self.files()
        base = launched.clean_environment() | self.instructions(diary, faults, **more)
        job = secrets.token_hex(4)
        processes = []
        for rank in range(ranks):
            own = {"PMI_RANK": str(rank), "PMI_SIZE": str(ranks), "MPI_LOCALRANKID": str(rank)}
            own |= {"MPI_LOCALNRANKS": str(ranks), "AADL_JOB_ID": job}
            given = (self.arguments, base | (own if ranks > 1 else {}), str(log))
            processes.append(launched.CONTEXT.Process(target=_become, args=given))
        return Job(processes, log, diary)

    def run(self, *faults: Fault, **more: Any) -> Ended:
        return self.start(*faults, **more).wait()

    @property
    def run_folder(self) -> Path:
        """Where the only run keeps its checkpoints."""
        [record] = self.results.glob("*/*/*/seed-*.run")
        return record

    @property
    def record(self) -> Path:
        """The file of the only run."""
        [record] = self.results.glob("*/*/*/seed-*.h5")
        return record


def differences(expected: tuple[Place, Ended], found: tuple[Place, Ended], tolerance: float | None = None) -> list[str]:
    """How two finished runs differ: final states by digest on all ranks, records series by series, without times.

    With a relative tolerance losses alone are compared; without one, all are equal bit for bit.
    """
    if any(found[1].codes):
        return [f"it ended with {found[1].codes}: {found[1].tail()}"]
    whole, other = (read_run(place.record) for place, _ in (expected, found))
    if tolerance is not None:
        names = [name for name in whole.series if name.startswith("metrics/") and name.endswith("loss")]
        near = {
            n: np.allclose(whole.series[n], other.series[n], rtol=tolerance, atol=0.0, equal_nan=True) for n in names
        }
        return [f"{name} is not the same within {tolerance:g}" for name in names if not near[name]]
    texts = []
    digests = {entry["digest"] for _, ended in (expected, found) for entry in ended.entries("end")}
    if len(digests) != 1:
        texts.append(f"{len(digests)} final states")
    for name in sorted(whole.series.keys() | other.series.keys()):
        if not name.startswith("timing/"):
            left, right = (run.series.get(name, np.empty(0)) for run in (whole, other))
            if not np.array_equal(left, right, equal_nan=True):
                texts.append(f"{name} differs")
    return texts


if __name__ == "__main__":
    run_command(sys.argv[1:])
