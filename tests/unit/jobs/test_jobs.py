"""Sites are checked, requests are checked against them, and the scripts are those of golden_scripts.txt."""

import ast
import itertools
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from suite_cases import RAW, problem, result, run_config

from experiments.catalog import load_config
from experiments.distributed.ranks import Ranks
from experiments.records.status import run_path
from experiments.records.writing import write_run
from jobs import scaling, script, site, submit
from jobs.request import make_job, read_request

GOLDEN = Path(__file__).parent / "golden_scripts.txt"
CONFIG = ROOT / "experiments" / "configs" / "graduate_admissions" / "laptop.yaml"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
COMMON = ["--account", "ABC123", "--time", "2:00:00"]


@pytest.fixture(autouse=True)
def somewhere(monkeypatch):
    """A checkout whose path is the same on every machine."""
    monkeypatch.setattr(script, "CHECKOUT", Path("/home/me/aadl"))


def rendered(name, *options):
    """The script for the options of a command line."""
    given = ["config.yaml", "--site", name, "--results", "/scratch/my results", *options]
    parsed = submit.make_parser().parse_args([*given, "--python", "/home/me/aadl/.venv/bin/python"])
    paths = {"config": Path("/home/me/aadl/config.yaml"), "stage_environment": parsed.stage_environment,
             "stage_data": parsed.stage_data}  # fmt: skip
    request = read_request({key: value for key, value in vars(parsed).items() if not key.startswith("stage_")})
    job = make_job(site.read_site(name), request.model_copy(update=paths), "graduate_admissions-laptop", sys.executable)
    return script.render(job, job.folder / "job.sh", ["python", "-m", "jobs.submit", *given])


GOLDEN_CASES = {
    "summit-1": ("summit", *COMMON),
    "summit-256": ("summit", "--account", "ABC123", "--time", "12:00:00", "--nodes", "256"),
    "summit-staged-array": ("summit", *COMMON, "--nodes", "2", "--array", "seeds=0-9", "--stage-data", "/scratch/data"),
    "frontier-4": ("frontier", *COMMON, "--nodes", "4", "--set", "training.epochs=7", "--set", "seeds=0,1"),
    "frontier-staged": ("frontier", *COMMON, "--nodes", "64", "--stage-environment", "/home/me/env.tar.gz",
                        "--stage-data", "/scratch/data"),
    "perlmutter-2-chain": ("perlmutter", *COMMON, "--nodes", "2", "--chain", "3", "--queue", "preempt"),
    "generic-slurm-cpu": ("generic-slurm", "--time", "1-00:00:00", "--nodes", "2", "--ranks-per-node", "2"),
    "generic-slurm-gpu-array": ("generic-slurm", *COMMON, "--nodes", "2", "--ranks-per-node", "4", "--cores-per-rank",
                                "8", "--gpus-per-node", "4", "--queue", "gpu", "--array", "seeds=0,2,4-6"),
    "generic-lsf-gpu": ("generic-lsf", *COMMON, "--nodes", "2", "--ranks-per-node", "4", "--cores-per-rank", "8",
                        "--gpus-per-node", "4", "--queue", "normal"),
    "workstation": ("workstation", "--ranks-per-node", "2"),
}  # fmt: skip


def own_lines(name, text):
    """The lines of a script that its template does not have as they are."""
    template = {"summit": "lsf", "generic-lsf": "lsf", "workstation": "workstation"}.get(name, "slurm")
    common = (script.TEMPLATES / f"{template}.sh").read_text().replace("@@", "@").splitlines()
    return [line for line in text.splitlines() if line not in common]


def test_scripts_are_the_golden_ones():
    """UPDATE_GOLDEN=1 writes the file again, to be read in the diff."""
    sections = []
    for case, options in GOLDEN_CASES.items():
        text = rendered(*options)
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        sections.append("\n".join([f"=== {case}", *own_lines(options[0], text)]) + "\n")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text("\n".join(sections))
    assert "\n".join(sections) == GOLDEN.read_text()


@pytest.mark.parametrize("name", site.site_names())
def test_every_site_says_what_was_verified_and_where_it_comes_from(name):
    read = site.read_site(name)
    assert read.name == name and read.sources
    assert read.verified.by in ("local Slurm", "fake LSF", "this machine", "never")  # no real machine yet
    assert (read.verified.date is None) == (read.verified.by == "never")


def test_the_sites_of_the_suite():
    expected = ["frontier", "generic-lsf", "generic-slurm", "perlmutter", "summit", "workstation"]
    assert site.site_names() == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("frontier", ["--time", "2:00:00"], "--account is missing: frontier runs no job without one"),
        ("frontier", ["--account", "A"], "--time is missing"),
        ("frontier", ["--account", "A", "--time", "2:00"], "two minutes to Slurm and two hours to LSF, got '2:00'"),
        ("frontier", ["--account", "A", "--time", "0:04:00"], "--time must be longer than the 300 seconds"),
        ("frontier", ["--account", "A", "--time", "2:00:01"], "at most 2:00:00 for 1 nodes in queue batch"),
        ("frontier", ["--account", "A b", "--time", "2:00:00"], "--account must be a word"),
        ("frontier", [*COMMON, "--nodes", "0"], "--nodes must be greater than 0, got 0"),
        ("frontier", [*COMMON, "--nodes", "9473"], "--nodes must be at most 9472 in queue batch"),
        ("frontier", [*COMMON, "--queue", "extended", "--nodes", "65"], "--nodes must be at most 64"),
        ("frontier", [*COMMON, "--queue", "fast"], "--queue must be one of batch, extended, debug on frontier"),
        ("frontier", [*COMMON, "--ranks-per-node", "9"], "at most the 8 GPUs of a node, one for each rank, got 9"),
        ("frontier", [*COMMON, "--gpus-per-node", "9"], "--gpus-per-node must be at most 8 on frontier, got 9"),
        ("frontier", [*COMMON, "--gpus-per-node", "0", "--ranks-per-node", "57"], "at most the 56 cores"),
        ("frontier", [*COMMON, "--cores-per-rank", "8"], "--cores-per-rank must be at most 7: 8 ranks share the 56"),
        ("frontier", [*COMMON, "--chain", "0"], "--chain must be greater than 0, got 0"),
        ("frontier", [*COMMON, "--chain", "2", "--array", "seeds=0-1"], "--chain and --array exclude each other"),
        ("frontier", [*COMMON, "--array", "sizes=1-2"], "--array must be seeds=... as seeds=0-9"),
        ("frontier", [*COMMON, "--array", "seeds=a"], "--array: seeds must be integers as 3, [0, 1, 2]"),
        ("frontier", [*COMMON, "--name", "two words"], "--name must be a name of letters"),
        (
            "frontier",
            [*COMMON, "--queue", "debug", "--chain", "3"],
            "--chain must ask for one job in queue debug of frontier",
        ),
        (
            "frontier",
            [*COMMON, "--queue", "debug", "--array", "seeds=0-9"],
            "--array must ask for one job in queue debug of",
        ),
        (
            "summit",
            ["--account", "A", "--time", "1:00:30"],
            "--time must be whole minutes, because LSF knows no seconds",
        ),
        ("workstation", ["--nodes", "2"], "--nodes must be 1 on workstation"),
        ("workstation", ["--account", "A"], "--account must be left out for workstation"),
        ("workstation", ["--queue", "q"], "--queue must be left out for workstation"),
        ("workstation", ["--array", "seeds=0-1"], "--array and --chain need a batch system"),
        ("workstation", ["--stage-data", "/"], "need a disk on each node, and workstation names none"),
        ("frontier", [*COMMON, "--results", "/a%b"], "--results must hold neither % nor a new line, got '/a%b'"),
        ("frontier", [*COMMON, "--stage-data", "/no/where"], "--stage-data: /no/where does not exist"),
        ("nowhere", [], "--site must be one of frontier, generic-lsf"),
        ("missing/file.yaml", [], "file.yaml"),
    ],
)
def test_a_request_that_a_site_cannot_run_is_one_sentence(name, options, message, capsys, tmp_path):
    arguments = [str(CONFIG), "--site", name, "--results", str(tmp_path / "results"), *options]
    assert submit.main(arguments) == 2
    told = capsys.readouterr()
    assert message in told.err and len(told.err.splitlines()) == 1 and told.err.startswith("error: ")
    assert not (tmp_path / "results").exists() and not told.out


def test_a_wrong_configuration_is_refused_before_anything_is_submitted(tmp_path, capsys):
    arguments = [str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path / "results")]
    assert submit.main([*arguments, "--set", "training.epochs=0"]) == 2
    assert "training.epochs must be greater than 0, got 0" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_what_runs_in_a_single_process_is_refused_before_it_waits_in_a_queue(tmp_path, capsys):
    config = ROOT / "experiments" / "configs" / "burgers_2d" / "laptop.yaml"
    arguments = [str(config), "--site", "frontier", *COMMON, "--results", str(tmp_path / "results")]
    variant = next(name for name in load_config(config).variants if name.startswith("lm"))
    assert submit.main([*arguments, "--set", f"variants={variant}"]) == 2
    assert f"{variant}: the optimizer runs in a single process, not on several ranks" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing_behind(tmp_path, capsys):
    results = tmp_path / "results"
    assert submit.main([str(CONFIG), "--site", "frontier", *COMMON, "--results", str(results), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=graduate_admissions-laptop\n")
    assert not results.exists()


@pytest.mark.parametrize("arguments", [["--help"], [str(CONFIG), "--site", "frontier", *COMMON, "--dry-run"]])
def test_help_and_dry_runs_import_no_torch(arguments):
    """Login nodes start Python slowly, and some cannot import torch at all."""
    script = (
        "import sys; sys.modules['torch'] = None; from jobs import submit\n"
        f"try:\n    code = submit.main({arguments!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'matplotlib', 'h5py', 'numpy', 'scipy'} & {n for n, m in sys.modules.items() if m}\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m jobs.submit" in done.stdout or done.stdout.startswith("#!/bin/bash")


def test_a_dry_run_draws_the_script_that_is_submitted(scheduler, tmp_path, capsys, monkeypatch):
    scheduler("sbatch", "echo 7")
    arguments = [str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path / "results")]
    arguments += ["--set", "scale=mine", "--array", "seeds=0-1"]
    assert submit.main([*arguments, "--dry-run"]) == 0
    drawn = capsys.readouterr().out
    assert "#SBATCH --job-name=graduate_admissions-mine\n" in drawn
    assert submit.main(arguments) == 0
    [kept] = (tmp_path / "results" / "jobs").glob("*.sh")

    def options(text):
        return [line for line in text.splitlines() if not line.startswith("# ")]

    assert options(kept.read_text()) == options(drawn)


def test_fewer_cores_for_more_ranks_than_usual():
    text = rendered("frontier", *COMMON, "--gpus-per-node", "0", "--ranks-per-node", "14")
    assert "--cpus-per-task=4" in text and "--gpu-bind" not in text


def test_everything_is_quoted(tmp_path):
    """The shell gives the program exactly what the user typed."""
    awkward = "variants={'a': \"$HOME `id`\"}"
    text = rendered("workstation", "--set", awkward)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >'{tmp_path}/arguments'\n")
    program.chmod(0o755)
    text = text.replace("/home/me/aadl/.venv/bin/python", str(program)).replace("cd /home/me/aadl ", f"cd {tmp_path} ")
    subprocess.run(["bash"], input=text, text=True, check=True)
    told = (tmp_path / "arguments").read_text().splitlines()
    assert told[-4:] == ["--results", "/scratch/my results", "--set", awkward]


# --- sites


def raw_site(**changes):
    raw = {"title": "A", "verified": {"by": "never"}, "sources": ["a book"], "scheduler": "slurm", "launcher": "srun"}
    return {name: value for name, value in {**raw, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 3}, "unknown key nodes; valid keys are: name, title, "),
        ({"node": {"sockets": 2}}, "unknown key node.sockets"),
        ({"verified": None}, "verified is missing"),
        ({"verified": {"by": "hearsay"}}, "verified.by must be one of real machine, local Slurm"),
        ({"verified": {"by": "real machine"}}, "verified.date must be given"),
        ({"verified": {"by": "real machine", "date": "soon"}}, "verified.date must be a date"),
        ({"sources": []}, "sources must name at least one source, got []"),
        ({"scheduler": "pbs"}, "scheduler must be one of slurm, lsf, none"),
        ({"launcher": "jsrun"}, "launcher must be one of srun for scheduler slurm, got 'jsrun'"),
        ({"directives": ["--x={sockets}"]}, "directives[0] must be a line in which braces hold one of nodes,"),
        ({"directives": ["--x={nodes.x}"]}, "directives[0] must be a line in which braces hold one of nodes,"),
        ({"directives": ["--x={"]}, "directives[0] must be a line in which braces hold one of nodes,"),
        ({"account_directive": "-A {queue}"}, "account_directive must be a line in which braces hold one of account,"),
        ({"queue_directive": "-p {queues}"}, "queue_directive must be a line in which braces hold one of queue, "),
        ({"directives": ["a\nb"]}, "directives[0] must be a line"),
        ({"environment": {"A": "$(id)"}}, "environment.A must be a text without"),
        ({"environment": {"A": 'a"b'}}, "environment.A must be a text without"),
        ({"environment": {"a-b": "c"}}, "a name in environment must be a name of a variable"),
        ({"node_local": {"path": "relative"}}, "node_local.path must be an absolute path"),
        ({"node_local": {"path": "/a b"}}, "node_local.path must be an absolute path"),
        ({"warning": {"signal": "KILL"}}, "warning.signal must be one of USR1, USR2, TERM"),
        ({"node": {"cores": 4}, "ranks": {"per_node": 2, "cores": 3}}, "ranks must fit the node of 4 cores"),
        ({"node": {"gpus": 2}, "ranks": {"gpus_per_node": 3}}, "ranks.gpus_per_node must be at most the 2"),
        ({"queues": {"q": {"limits": []}}}, "queues.q.directives is missing"),
        ({"queues": {"q": {"directives": [], "limits": [{"nodes": 2, "minutes": 1}, {"nodes": 1, "minutes": 1}]}}},
         "ascending nodes"),
        ({"queues": ["q"]}, "queues must be a mapping"),
        ({"queues": {"q": {"directives": [], "repeats": 0}}}, "queues.q.repeats must be true or false"),
        ({"node": {"gpus": 4}, "gpu_order": [3, 2, 1]}, "gpu_order must name each of the 4 GPUs of a node"),
        ({"node": {"gpus": 2}, "gpu_order": [1, 1]}, "gpu_order must name each of the 2 GPUs of a node"),
    ],
)  # fmt: skip
def test_a_wrong_site_is_one_sentence(tmp_path, changes, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw_site(**changes)))
    with pytest.raises(ValueError, match=r"mine\.yaml: ") as error:
        site.read_site(str(path))
    assert message in str(error.value)


def test_what_only_lsf_demands(tmp_path):
    path = tmp_path / "mine.yaml"
    lsf = {"scheduler": "lsf", "launcher": "jsrun"}
    path.write_text(yaml.safe_dump(raw_site(**lsf, warning={"seconds": 90})))
    with pytest.raises(ValueError, match="whole minutes for LSF, got 90"):
        site.read_site(str(path))
    path.write_text(yaml.safe_dump(raw_site(**lsf, directives=["-alloc_flags NVME"])))
    with pytest.raises(ValueError, match="of which LSF honors one line"):
        site.read_site(str(path))
    path.write_text(yaml.safe_dump(raw_site(**lsf)))
    assert site.read_site(str(path)).name == "mine"


@pytest.mark.parametrize("name", ["frontier", "perlmutter", "summit"])
def test_a_job_in_a_debug_queue_is_not_started_again(name):
    debug = rendered(name, *COMMON, "--queue", "debug")
    assert "max_restarts=0" in debug and "--requeue" not in debug
    assert "max_restarts=20" in rendered(name, *COMMON)


def test_the_order_of_gpus_is_set_after_the_launcher_and_for_whole_nodes_alone():
    whole = rendered("perlmutter", *COMMON)
    assert "rank.sh env CUDA_VISIBLE_DEVICES=3,2,1,0 /home" in whole and "export CUDA_VISIBLE_DEVICES" not in whole
    some = rendered("perlmutter", *COMMON, "--gpus-per-node", "2", "--ranks-per-node", "2")
    assert "CUDA_VISIBLE_DEVICES" not in some


# --- submission


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """scheduler(name, text): puts a command on PATH that says this and notes how it was called."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(name, text, code=0):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncat >>{tmp_path}/stdin\n{text}\nexit {code}\n')
        path.chmod(0o755)
        return tmp_path / "calls"

    return make


def test_a_chain_depends_link_by_link(scheduler, tmp_path, capsys):
    calls = scheduler("sbatch", f"wc -l <{tmp_path}/calls | tr -d ' '")
    arguments = [str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path / "results"), "--chain", "3"]
    assert submit.main(arguments) == 0
    assert capsys.readouterr().out.split() == ["1", "2", "3"]
    lines = calls.read_text().splitlines()
    [kept] = (tmp_path / "results" / "jobs").glob("graduate_admissions-laptop-*.sh")
    assert lines == [
        f"--parsable {kept}",
        f"--parsable --dependency=afterany:1 {kept}",
        f"--parsable --dependency=afterany:2 {kept}",
    ]
    assert "max_restarts=0" in kept.read_text() and "--no-requeue" in kept.read_text()


def test_lsf_takes_a_file_or_stdin_as_its_site_says(scheduler, tmp_path, capsys):
    calls = scheduler("bsub", "echo 'Job <77> is submitted to queue <batch>.'")
    results = ["--results", str(tmp_path / "results")]
    assert submit.main([str(CONFIG), "--site", "summit", *COMMON, *results]) == 0
    assert calls.read_text().rstrip().endswith(".sh") and not (tmp_path / "stdin").read_text()
    assert submit.main([str(CONFIG), "--site", "generic-lsf", *COMMON, *results]) == 0
    assert calls.read_text().splitlines()[1] == "" and (tmp_path / "stdin").read_text().startswith("#!/bin/bash")
    assert capsys.readouterr().out.split() == ["77", "77"]


FOREIGN = {
    "SBATCH_ACCOUNT": "other", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXPORT": "NONE",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SRUN_CPUS_PER_TASK": "9",
    "LSB_JOBID": "1", "LSB_DEFAULTQUEUE": "other", "PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0", "PMI2_FD": "3",
    "OMPI_COMM_WORLD_RANK": "0", "JSM_NAMESPACE_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here",
    "CUDA_VISIBLE_DEVICES": "1", "AADL_RESTART_COUNT": "7", "TORCHELASTIC_RUN_ID": "none", "MPI_LOCALRANKID": "0",
}  # fmt: skip
WANTED = {
    "PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "LSF_ENVDIR": "/etc/lsf",
    "AADL_DATA_DIR": "/d", "OMPI_MCA_btl": "tcp", "OMP_NUM_THREADS": "2", "NCCL_DEBUG": "INFO",
    "RANKING": "x", "SLURMISH": "x",
}  # fmt: skip


@pytest.mark.parametrize(
    ("site_name", "answer"),
    [
        ("frontier", "77"),
        ("frontier", "77;cluster"),
        ("frontier", "note: 3 nodes are free\n77\nhave a nice day"),
        ("generic-lsf", "project 12 is charged\nJob <77> is submitted to queue <batch>."),
    ],
)
def test_the_id_of_a_job_is_found_among_notes_of_the_site(scheduler, tmp_path, capsys, site_name, answer):
    for name in ("sbatch", "bsub"):
        scheduler(name, f"echo 'a warning 5' >&2; printf '%b\\n' {answer!r}")
    options = COMMON if site_name == "frontier" else ["--time", "2:00:00"]
    assert submit.main([str(CONFIG), "--site", site_name, *options, "--results", str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out.split() == ["77"]


def test_what_the_shell_of_another_job_holds_stays_there():
    assert submit.submission_environment(FOREIGN | WANTED) == WANTED


@pytest.mark.parametrize(("site_name", "command"), [("frontier", "sbatch"), ("generic-lsf", "bsub")])
def test_options_of_the_shell_do_not_count_and_are_named(scheduler, tmp_path, capsys, monkeypatch, site_name, command):
    answer = {"sbatch": "7", "bsub": "Job <7> is submitted"}[command]
    scheduler(command, f"env >{tmp_path}/environment; echo '{answer}'")
    for name, text in FOREIGN.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    options = COMMON if command == "sbatch" else ["--time", "2:00:00"]
    assert submit.main([str(CONFIG), "--site", site_name, *options, "--results", str(tmp_path / "results")]) == 0
    told = capsys.readouterr()
    assert "note: LSB_DEFAULTQUEUE, SBATCH_ACCOUNT, SBATCH_EXPORT, SBATCH_NO_REQUEUE, SBATCH_TIMELIMIT of" in told.err
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert not environment.keys() & FOREIGN.keys() and environment["SLURM_CONF"] == "/etc/slurm.conf"


def test_what_the_scheduler_says_is_passed_on(scheduler, tmp_path, capsys, monkeypatch):
    arguments = [str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path / "results")]
    scheduler("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2", 1)
    assert submit.main(arguments) == 2
    assert "Invalid account" in capsys.readouterr().err.splitlines()[-1]
    scheduler("sbatch", "echo nonsense")
    assert submit.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: sbatch refused")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(arguments) == 2
    assert "sbatch was not found: submit on a login node of frontier" in capsys.readouterr().err


def test_tmpdir_is_refused_on_summit(scheduler, tmp_path, capsys, monkeypatch):
    calls = scheduler("bsub", "echo 'Job <77> is submitted to queue <batch>.'")
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert submit.main([str(CONFIG), "--site", "summit", *COMMON, "--results", str(tmp_path / "results")]) == 2
    assert "TMPDIR must not be set" in capsys.readouterr().err and not calls.exists()


def test_results_that_cannot_be_written_are_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert submit.main([str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_jobs_need_neither_mpi_nor_a_device():
    code = (
        "import sys, jobs.submit, jobs.scaling, torch\n"
        "assert 'mpi4py' not in sys.modules and not torch.cuda.is_initialized()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_site_names_stay_out_of_the_code():
    names = set(site.site_names()) - {"workstation"}
    for path in (ROOT / "jobs").glob("*.py"):
        tree = ast.parse(path.read_text())
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & names, path


@pytest.mark.slow
def test_a_workstation_runs_two_ranks_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CHECKOUT", ROOT)
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(RAW | {"seeds": 0}))
    arguments = [str(config), "--site", "workstation", "--ranks-per-node", "2", "--results", str(tmp_path / "results")]
    assert submit.main([*arguments, "--set", "variants=sgd"]) == 0
    run = scaling.read_run(tmp_path / "results" / "graduate_admissions" / "test" / "sgd" / "seed-0.h5")
    assert run.attributes["world_size"] == 2 and run.attributes["launcher"] == "torchrun"


# --- the shell helpers


def test_a_rank_that_stopped_early_looks_like_a_success_and_tells_the_script(tmp_path):
    for rank, code, expected, told in ((0, 75, 0, True), (1, 75, 0, False), (0, 3, 3, False), (0, 0, 0, False)):
        mark = tmp_path / f"stopped-{rank}-{code}"
        env = {"PATH": os.environ["PATH"], "SLURM_PROCID": str(rank), "AADL_STOPPED_FILE": str(mark)}
        command = ["bash", str(ROOT / "jobs" / "templates" / "rank.sh"), "bash", "-c", f"exit {code}"]
        assert subprocess.run(command, env=env, check=False).returncode == expected
        assert mark.exists() == told


def test_staging_leaves_no_half_copies(tmp_path):
    stage = ["bash", str(ROOT / "jobs" / "templates" / "stage.sh")]
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a file").write_text("1")
    local = tmp_path / "local"
    failed = subprocess.run([*stage, "environment", tmp_path / "bad.tar.gz", local / "env"], capture_output=True)
    assert failed.returncode != 0 and not list(local.iterdir())
    for _ in range(2):  # the second time it is there already
        subprocess.run([*stage, "data", tmp_path / "data", local / "data"], check=True)
        assert (local / "data" / "a file").read_text() == "1"
        assert sorted(path.name for path in local.iterdir()) == ["data", "data.staged"]


@pytest.mark.parametrize("end", ["exit 1", "kill -KILL $PPID"])
def test_an_environment_that_was_not_unpacked_to_the_end_is_made_anew(tmp_path, end):
    """conda-unpack fails, or all is killed while it runs; the next start must not take that for an environment."""
    local = tmp_path / "local" / "environment"
    stage = [
        "bash",
        str(ROOT / "jobs" / "templates" / "stage.sh"),
        "environment",
        str(tmp_path / "packed.tar.gz"),
        str(local),
    ]
    (tmp_path / "bin").mkdir()
    unpack = tmp_path / "bin" / "conda-unpack"
    # As the real one, it must run in the final place, and once: it replaces the placeholder by that path.
    unpack.write_text(
        '#!/bin/sh\nplace=$(cd "$(dirname "$0")/.." && pwd)\n'
        f'echo "$place" >>{tmp_path}/calls\necho half >"$place/half"\n[ -e {tmp_path}/go ] || {{ {end}; sleep 1; }}\n'
        'rm "$place/half"\necho "$place" >"$place/prefix"\n'
    )
    unpack.chmod(0o755)
    subprocess.run(["tar", "-czf", tmp_path / "packed.tar.gz", "-C", tmp_path, "bin"], check=True)
    assert subprocess.run(stage, check=False).returncode != 0
    (tmp_path / "go").touch()
    for _ in range(2):  # the second time it is whole
        subprocess.run(stage, check=True, timeout=30)
        assert (local / "prefix").read_text() == f"{local}\n" and not (local / "half").exists()
    assert (tmp_path / "calls").read_text().split() == [str(local)] * 2


# --- scaling


def study(tmp_path, mode, *more):
    arguments = [str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path), "--dry-run", *more]
    return scaling.main([*arguments, "--mode", mode, "--nodes", "1,2,4"])


def test_a_study_has_one_job_a_number_of_nodes(tmp_path, capsys):
    assert study(tmp_path, "weak") == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if "--nodes=" in line and "SBATCH" in line] == [
        f"#SBATCH --nodes={number}" for number in (1, 2, 4)
    ]
    assert "training.batch_size=40 " in text.replace("\n", " ") and "training.batch_size=160" in text
    assert f"{tmp_path}/scaling/weak/nodes-4" in text
    assert study(tmp_path, "strong") == 0
    assert "batch_size" not in capsys.readouterr().out


@pytest.mark.parametrize("nodes", ["", "2,1", "1,1", "0,1", "1,two"])
def test_numbers_of_nodes_are_checked(tmp_path, capsys, nodes):
    arguments = [str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path), "--mode", "weak"]
    assert scaling.main([*arguments, f"--nodes={nodes}"]) == 2
    assert "--nodes must be rising integers" in capsys.readouterr().err


def test_a_study_is_no_work_for_a_debug_queue(tmp_path, capsys):
    assert study(tmp_path, "strong", "--queue", "debug") == 2
    assert "--nodes must be one number in queue debug of frontier, which takes no series" in capsys.readouterr().err


def test_weak_scaling_needs_multiples(tmp_path, capsys):
    arguments = [str(CONFIG), "--site", "frontier", *COMMON, "--results", str(tmp_path), "--mode", "weak"]
    assert scaling.main([*arguments, "--nodes", "2,3"]) == 2
    assert "must be multiples of the smallest number" in capsys.readouterr().err


def test_points_of_physics_informed_networks_grow_with_the_ranks():
    config = load_config(ROOT / "experiments" / "configs" / "burgers_2d" / "laptop.yaml")
    points, conditions = config.problem.num_points, config.problem.num_conditions
    assert scaling.work_overrides(config, "weak", 8, 2) == [
        f"problem.num_points={4 * points}",
        f"problem.num_conditions={4 * conditions}",
    ]
    assert scaling.work_overrides(config, "strong", 8, 2) == []


def test_a_batch_for_each_rank_stays_or_becomes_that_of_the_smallest_job():
    config = load_config(ROOT / "experiments" / "configs" / "imagenet" / "paper.yaml")
    whole = 6 * config.training.batch_size_per_rank
    assert scaling.work_overrides(config, "weak", 12, 6) == []
    strong = [f"training.batch_size={whole}", "training.batch_size_per_rank=null"]
    assert scaling.work_overrides(config, "strong", 12, 6) == strong


def test_collecting_gives_rates_efficiencies_and_a_figure(tmp_path, capsys):
    """Twice the ranks in 0.625 of the time: efficiency 80 %."""
    for (nodes, ranks, seconds), seed in itertools.product([(1, 8, 10.0), (2, 16, 6.25)], (0, 1)):
        folder = scaling.folder_of(tmp_path, "strong", nodes)
        ranks_of = Ranks(0, ranks)
        run = run_config(seed=seed, epochs=4)
        path = run_path(folder, run)
        write_run(path, run, problem(), result([1.0] * 5, seconds_per_epoch=seconds), ranks_of, START, START)
    assert scaling.main(["collect", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    rows = [line.split("|") for line in told.splitlines() if line.startswith("| strong")]
    assert [row[3].strip() for row in rows] == ["8", "16"]
    assert [row[7].strip() for row in rows] == ["100 %", "80 %"] and [row[6].strip() for row in rows] == [
        "1.00",
        "1.60",
    ]
    assert (tmp_path / "scaling" / "strong.png").exists() and not (tmp_path / "scaling" / "weak.png").exists()
    assert (tmp_path / "scaling" / "scaling.md").read_text() in told


def test_collecting_nothing_is_one_sentence(tmp_path, capsys):
    assert scaling.main(["collect", str(tmp_path)]) == 2
    assert "no records of a scaling study" in capsys.readouterr().err
