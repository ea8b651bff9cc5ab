"""LSF without LSF: bsub, bjobs, bkill, brequeue, jsrun and mpirun, as unkind as the real ones are said to be.

`install(folder, mode)` writes executables that call `main` here; put `folder / "bin"` first on PATH and set FAKE_LSF to
the folder. State lies in files: `<id>[.<element>]/status` is PEND, RUN, DONE or EXIT.

Mode "summit": the script is a file, never stdin; it runs on a launch node that is not one of the compute nodes, that
stands first in every list, and from which jsrun alone leads on; nodes come in an order that is not sorted, and rank 0
is not on the first. Mode "generic": the script comes on stdin; a file would be run without its #BSUB lines.
"""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

CORES, GPUS = 42, 6  # of a node of Summit
# Of bsub, with whether they take a value.
BSUB = {"-P": 1, "-W": 1, "-nnodes": 1, "-J": 1, "-o": 1, "-e": 1, "-q": 1, "-alloc_flags": 1, "-w": 1, "-wt": 1,
        "-wa": 1, "-n": 1, "-R": 1, "-gpu": 1, "-N": 0, "-r": 0}  # fmt: skip
JSRUN = {"-n": "nrs", "-r": "rs_per_host", "-a": "tasks_per_rs", "-c": "cpu_per_rs", "-g": "gpu_per_rs", "-b": "bind",
         "-d": "launch_distribution", "-X": "exit_on_error", "-E": "export", "-l": "latency_priority"}  # fmt: skip


def install(folder, mode):
    """Writes the commands, for one mode."""
    (folder / "bin").mkdir(parents=True)
    (folder / "mode").write_text(mode)
    commands = ["bsub", "bjobs", "bkill", "brequeue", "jsrun" if mode == "summit" else "mpirun"]
    for name in commands:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
        path.chmod(0o755)


def fail(text):
    print(text, file=sys.stderr)
    raise SystemExit(255)


def main(command, arguments):
    """Runs one of the commands."""
    folder = Path(os.environ["FAKE_LSF"])
    commands = {"bsub": bsub, "bjobs": bjobs, "bkill": bkill, "brequeue": brequeue, "jsrun": jsrun, "mpirun": mpirun,
                "run": run_job}  # fmt: skip
    return commands[command](folder, arguments)


# --- bsub


def bsub(folder, arguments):
    summit = (folder / "mode").read_text() == "summit"
    options, rest = bsub_options(arguments)
    if rest and not summit:
        fail(f"{rest[0]}: command is run as it is, its #BSUB lines are not read")
    if not rest and summit:
        fail("bsub < script: redirection does not work on this system; use bsub script")
    script = Path(rest[0]).read_text() if rest else sys.stdin.read()
    lines = [line[len("#BSUB") :] for line in script.splitlines() if line.startswith("#BSUB")]
    in_script, strange = bsub_options([word for line in lines for word in shlex.split(line)])
    if strange:
        fail(f"bsub: {strange[0]} in the script is no option")
    if sum("-alloc_flags" in line for line in lines) > 1:
        fail("bsub: only one -alloc_flags is honored")
    job = {**in_script, **options, "summit": summit, "submitted_from": os.getcwd(), "script": script}
    check_bsub(job, summit)
    number = str(max([1000, *(int(path.name.split(".")[0]) for path in folder.glob("[0-9]*"))]) + 1)
    match = re.fullmatch(r"(.+)\[1-(\d+)\]", job["-J"])
    elements = [f"{number}.{index}" for index in range(1, int(match[2]) + 1)] if match else [number]
    for element in elements:
        (folder / element).mkdir()
        (folder / element / "job.json").write_text(json.dumps(job))
        (folder / element / "status").write_text("PEND")
        command = [sys.executable, "-S", __file__, "run", element]
        with open(folder / element / "runner.log", "ab") as log:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    print(f"Job <{number}> is submitted to {'queue' if '-q' in job else 'default queue'} <{job.get('-q', 'normal')}>.")
    return 0


def bsub_options(words):
    """(options, what follows them)."""
    options, words = {}, list(words)
    while words and words[0].startswith("-"):
        name = words.pop(0)
        if name not in BSUB:
            fail(f"bsub: illegal option -- {name}")
        if BSUB[name] and not words:
            fail(f"bsub: option requires an argument -- {name}")
        options[name] = words.pop(0) if BSUB[name] else ""
    return options, words


def check_bsub(job, summit):
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", job.get("-W", ""))
    if match is None or (match[1] and int(match[2]) > 59):
        fail(f"{job.get('-W')}: Illegal time specification for -W, [hours:]minutes")
    if ("-wa" in job) != ("-wt" in job):
        fail("bsub: -wa and -wt must be given together")
    if not re.fullmatch(r"\d+", job.get("-wt", "5")):
        fail(f"{job['-wt']}: -wt is in minutes")
    if summit:
        if "-P" not in job:
            fail("bsub: a project must be given with -P")
        if "-n" in job or "-R" in job or "-nnodes" not in job:
            fail("bsub: -nnodes, and neither -n nor -R, in easy mode")
        minutes = int(match[1] or 0) * 60 + int(match[2])
        if int(job["-nnodes"]) <= 45 and minutes > 120:
            fail("bsub: at most 2 hours for up to 45 nodes")
    elif "-nnodes" in job or "-alloc_flags" in job:
        fail("bsub: illegal option -- nnodes")
    elif not re.fullmatch(r"span\[ptile=\d+\]", job.get("-R", "")):
        fail(f"bsub: bad resource requirement {job.get('-R')}")


# --- the job itself


def hosts_of(job, number):
    """Hosts with their slots, the launch node first where there is one, never sorted."""
    if job["summit"]:
        names = [f"h{41 - index // 18}n{18 - index % 18:02}" for index in range(int(job["-nnodes"]))]
        random.Random(number).shuffle(names)
        if len(names) > 1 and names == sorted(names):
            names.reverse()
        return [("batch4", 1), *((name, CORES) for name in names)]
    slots, each = int(job["-n"]), int(re.search(r"\d+", job["-R"])[0])
    if slots % each:
        fail(f"{slots} slots do not fill hosts of {each}")
    return [(f"compute-{9 - index}", each) for index in range(slots // each)]


def job_environment(folder, element, job, restart):
    hosts = hosts_of(job, element)
    number, _, index = element.partition(".")
    flat = [name for name, slots in hosts for _ in range(slots)]
    (folder / element / "hostfile").write_text("\n".join(flat) + "\n")
    kept = ("PATH", "HOME", "USER", "LANG", "FAKE_LSF", "FAKE_LSF_FORWARDS", "AADL_DATA_DIR", "STAND_IN_DELAY")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env |= {
        "LSB_JOBID": number,
        "LSB_JOBINDEX": index or "0",
        "LSB_JOBNAME": job["-J"],
        "LSB_QUEUE": job.get("-q", "normal"),
        "LSB_SUB_HOST": "login1",
        "LS_SUBCWD": job["submitted_from"],
        "LSB_MCPU_HOSTS": " ".join(f"{name} {slots}" for name, slots in hosts),
        "LSB_DJOB_HOSTFILE": str(folder / element / "hostfile"),
        "LSB_DJOB_NUMPROC": str(len(flat)),
        "LSB_EFFECTIVE_RSRCREQ": "select[type == any] order[r15s:pg]",
    }
    if gpus := re.match(r"num=(\d+)", job.get("-gpu", "")):
        env["LSB_EFFECTIVE_RSRCREQ"] += f" rusage[ngpus_physical={gpus[1]}.00/host]"
    if len(" ".join(flat)) <= 4096:
        env["LSB_HOSTS"] = " ".join(flat)
    if restart:
        env["LSB_RESTART"] = "Y"
    return env


def run_job(folder, arguments):
    """What sbatchd does: waits for the dependency, runs the script, and again when it was requeued."""
    [element] = arguments
    home = folder / element
    job = json.loads((home / "job.json").read_text())
    match = re.fullmatch(r"ended\((\d+)\)", job.get("-w", ""))
    while match and not all(status(path) in ("DONE", "EXIT") for path in folder.glob(f"{match[1]}*")):
        time.sleep(0.05)
    (home / "script.sh").write_text(job["script"])
    number, _, index = element.partition(".")
    output = job["-o"].replace("%J", number).replace("%I", index)
    restart = 0
    while True:
        with open(output, "ab") as log:
            process = subprocess.Popen(
                ["bash", str(home / "script.sh")],
                env=job_environment(folder, element, job, restart),
                cwd=job["submitted_from"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            (home / "pid").write_text(str(process.pid))
            (home / "status").write_text("RUN")
            code = process.wait()
        kill_job(folder, element)  # what the script left behind
        if not (home / "requeue").exists():
            break
        (home / "requeue").unlink()
        (home / "status").write_text("PEND")
        restart += 1
        time.sleep(0.2)
    (home / "code").write_text(str(code if code >= 0 else 128 - code))
    (home / "status").write_text("DONE" if code == 0 else "EXIT")
    return 0


def status(home):
    return (home / "status").read_text()


def kill_group(pid, number):
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_job(folder, element):
    """Ends every process of a job, on whichever node it seems to be."""
    number, _, index = element.partition(".")
    marks = {f"FAKE_LSF={folder}".encode(), f"LSB_JOBID={number}".encode(), f"LSB_JOBINDEX={index or 0}".encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marks <= set(path.read_bytes().split(b"\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue


def home_of(folder, text):
    """The folder of a job "1001", or of an element "1001[2]"."""
    match = re.fullmatch(r"(\d+)(?:\[(\d+)\])?", text)
    home = folder / (f"{match[1]}.{match[2]}" if match and match[2] else text)
    if match is None or not home.is_dir():
        fail(f"Job <{text}>: No matching job found")
    return home


def bjobs(folder, arguments):
    home = home_of(folder, arguments[-1])
    print(f"JOBID STAT\n{home.name} {status(home)}")
    return 0


def bkill(folder, arguments):
    """bkill -s SIGNAL signals every process of the job, the launcher included; without, INT, TERM and KILL follow."""
    named = arguments[:-1]
    home = home_of(folder, arguments[-1])
    if status(home) != "RUN":
        fail(f"Job <{home.name}>: Job is not running")
    pid = int((home / "pid").read_text())
    if named:
        kill_group(pid, getattr(signal, f"SIG{named[1]}"))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if not kill_group(pid, number):
            break
        time.sleep(1)
    return 0


def brequeue(folder, arguments):
    """Kills the job, this command with it if it was called from there, and runs it again with the same id."""
    home = home_of(folder, arguments[-1])
    if status(home) != "RUN":
        fail(f"Job <{home.name}>: Job is not running")
    (home / "requeue").touch()
    print(f"Job <{home.name}> is being requeued", flush=True)
    kill_group(int((home / "pid").read_text()), signal.SIGKILL)
    return 0


# --- launchers


def jsrun(folder, arguments):
    """Resource sets over the compute nodes of the job, checked as far as the guide says how."""
    options = {"-a": "1", "-c": "1", "-g": "0", "-X": "0", "-b": "packed:1", "-d": "packed"}
    exported, words = {}, list(arguments)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word.startswith("--smpiargs="):
            continue
        if word not in JSRUN:
            fail(f"jsrun: unknown option {word}")
        value = words.pop(0)
        if word == "-E":
            name, _, text = value.partition("=")
            exported[name] = text
        options[word] = value
    hosts = Path(os.environ["LSB_DJOB_HOSTFILE"]).read_text().split()
    nodes = list(dict.fromkeys(hosts))[1:]  # not the launch node
    sets, each, tasks, cores, gpus = (int(options[name]) for name in ("-n", "-r", "-a", "-c", "-g"))
    if sets != each * len(nodes):
        fail(f"jsrun: {sets} resource sets are not {each} on each of {len(nodes)} hosts")
    if each * cores > CORES or each * gpus > GPUS:
        fail(f"jsrun: {each} resource sets of {cores} cores and {gpus} GPUs exceed {CORES} cores and {GPUS} GPUs")
    if not re.fullmatch(r"none|rs|(proportional-)?packed:\d+", options["-b"]) or options["-d"] not in (
        "packed",
        "cyclic",
    ):
        fail(f"jsrun: bad binding {options['-b']} or distribution {options['-d']}")
    packed = re.fullmatch(r"packed:(\d+)", options["-b"])
    if packed and int(packed[1]) * tasks > cores:
        fail(f"jsrun: {tasks} tasks of {packed[1]} cores exceed the {cores} cores of a resource set")
    if options.get("-l", "").lower() != options.get("-l", ""):
        fail("jsrun: capital letters in -l allocate the wrong resources")
    order = nodes[1:] + nodes[:1]  # rank 0 is not where a list of hosts says
    size, ranks = sets * tasks, []
    for rank in range(size):
        local, host = rank % (each * tasks), order[rank // (each * tasks)]
        visible = range(local // tasks * gpus, (local // tasks + 1) * gpus)
        env = {
            "JSM_NAMESPACE_RANK": rank,
            "JSM_NAMESPACE_SIZE": size,
            "JSM_NAMESPACE_LOCAL_RANK": local,
            "JSM_NAMESPACE_LOCAL_SIZE": each * tasks,
            "OMPI_COMM_WORLD_RANK": rank,
            "OMPI_COMM_WORLD_SIZE": size,
            "OMPI_COMM_WORLD_LOCAL_RANK": local,
            "OMPI_COMM_WORLD_LOCAL_SIZE": each * tasks,
            "PMIX_RANK": rank,
            "PMIX_NAMESPACE": f"jsm-{os.getppid()}",
            "FAKE_HOST": host,
            "OMP_NUM_THREADS": exported.get("OMP_NUM_THREADS", 4 * cores),
        }
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible))
        if gpus and local % tasks >= gpus:  # EXCLUSIVE_PROCESS
            fail("CUDA error: all CUDA-capable devices are busy or unavailable: two ranks would share a GPU")
        ranks.append({**exported, **{name: str(value) for name, value in env.items()}})
    return start(words, ranks, ends_on_error=options["-X"] == "1")


def mpirun(folder, arguments):
    """Open MPI: other nodes get no more of the environment than -x names."""
    exported, mapping, size, words = [], "", 0, list(arguments)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word not in ("-np", "--map-by", "-x"):
            fail(f"mpirun: unknown option {word}")
        value = words.pop(0)
        if word == "-x":
            exported.append(value)
        elif word == "-np":
            size = int(value)
        else:
            mapping = value
    match = re.fullmatch(r"ppr:(\d+):node(?::pe=(\d+))?", mapping)
    slots = Path(os.environ["LSB_DJOB_HOSTFILE"]).read_text().split()
    nodes = list(dict.fromkeys(slots))
    if match is None or int(match[1]) * len(nodes) != size or size * int(match[2] or 1) > len(slots):
        fail(f"mpirun: {size} ranks as {mapping} do not fit {len(slots)} slots on {len(nodes)} hosts")
    each, ranks = int(match[1]), []
    for rank in range(size):
        numbers = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % each, "LOCAL_SIZE": each}
        env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in numbers.items()}
        env["FAKE_HOST"] = nodes[rank // each]
        missing = [name for name in exported if name not in os.environ]
        if missing:
            print(f"mpirun: warning: {missing[0]} to export is not set", file=sys.stderr)
        if rank >= each:  # as on another node
            env["FAKE_LSF_ONLY"] = " ".join([*exported, "PATH", "HOME", "USER", "LANG", *lsf_names()])
        ranks.append(env)
    return start(words, ranks, ends_on_error=True)


def lsf_names():
    return [name for name in os.environ if name.startswith(("LSB_", "LS_", "FAKE_LSF"))]


def start(command, ranks, *, ends_on_error):
    """Starts all ranks and waits; signals go on to them where FAKE_LSF_FORWARDS is set, and are lost otherwise.

    Without ends_on_error the ranks that are left run on when one fails, as they may on the real machine.
    """
    processes = []
    for env in ranks:
        only = env.pop("FAKE_LSF_ONLY", "").split()
        base = {name: value for name, value in os.environ.items() if not only or name in only}
        processes.append(
            subprocess.Popen(command, env={**base, **env}, stdin=subprocess.DEVNULL, start_new_session=True)
        )

    def forward(number, frame):
        for process in processes:
            if process.poll() is None and os.environ.get("FAKE_LSF_FORWARDS"):
                kill_group(process.pid, number)

    def end(number, frame):
        for process in processes:
            kill_group(process.pid, signal.SIGKILL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    if os.environ.get("FAKE_LSF_FORWARDS"):
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, forward)
    code = 0
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.poll()]
        code = code or next((value if value > 0 else 128 - value for value in failed), 0)
        if failed and ends_on_error:
            for process in processes:
                kill_group(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    failed = [process.returncode for process in processes if process.returncode]
    return code or next((value if value > 0 else 128 - value for value in failed), 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
