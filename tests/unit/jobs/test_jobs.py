"""Sites are checked, requests are checked against them, and the scripts are those of golden_scripts.txt."""

import ast
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from suite_cases import RAW

from experiments.catalog import load_config
from jobs import scaling, script, site, submit
from jobs.request import make_job, read_request

GOLDEN = Path(__file__).parent / "golden_scripts.txt"
CONFIG = ROOT / "experiments" / "configs" / "graduate_admissions" / "laptop.yaml"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
COMMON = ["--account", "ABC123", "--time", "2:00:00"]


def arguments(tmp_path, name="frontier", *options):
    """A command line that submits the laptop's configuration."""
    return [str(CONFIG), "--site", name, "--results", str(tmp_path / "results"), *options]


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


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("frontier", ["--time", "2:00:00"], "--account is missing: frontier runs no job without one"),
        ("frontier", ["--account", "A"], "--time is missing"),
        ("frontier", ["--account", "A", "--time", "2:00"], "two minutes to Slurm and two hours to LSF, got '2:00'"),
        ("frontier", ["--account", "A", "--time", "0:05:00"], "--time must be longer than the 300 seconds"),
        ("frontier", ["--account", "A", "--time", "2:00:01"], "at most 2:00:00 for 1 nodes in queue batch"),
        ("frontier", [*COMMON, "--nodes", "91", "--time", "2:00:01"], "at most 2:00:00 for 91 nodes in queue batch"),
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
        ("frontier", [*COMMON, "--queue", "debug", "--chain", "3"], "--chain must ask for one job in queue debug of"),
        ("frontier", [*COMMON, "--queue", "debug", "--array", "seeds=0-9"], "--array must ask for one job in queue"),
        ("summit", ["--account", "A", "--time", "1:00:30"], "must be whole minutes, because LSF knows no seconds"),
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
    assert submit.main(arguments(tmp_path, name, *options)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and printed.err.startswith("error: ")
    assert not (tmp_path / "results").exists() and not printed.out


def test_a_limit_itself_is_allowed():
    assert "#SBATCH --nodes=9472\n" in rendered("frontier", *COMMON, "--nodes", "9472")


def test_a_wrong_configuration_is_refused_before_anything_is_submitted(tmp_path, capsys):
    assert submit.main(arguments(tmp_path, "frontier", *COMMON, "--set", "training.epochs=0")) == 2
    assert "training.epochs must be greater than 0, got 0" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_what_runs_in_a_single_process_is_refused_before_it_waits_in_a_queue(tmp_path, capsys):
    config = ROOT / "experiments" / "configs" / "burgers_2d" / "laptop.yaml"
    variant = next(name for name in load_config(config).variants if name.startswith("lm"))
    options = arguments(tmp_path, "frontier", *COMMON, "--set", f"variants={variant}")
    assert submit.main([str(config), *options[1:]]) == 2
    assert f"{variant}: the optimizer runs in a single process, not on several ranks" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing_behind(tmp_path, capsys):
    assert submit.main(arguments(tmp_path, "frontier", *COMMON, "--dry-run")) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=graduate_admissions-laptop\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("options", [["--help"], [str(CONFIG), "--site", "frontier", *COMMON, "--dry-run"]])
def test_help_and_dry_runs_import_no_torch(options):
    """Login nodes start Python slowly, and some cannot import torch at all."""
    script = (
        "import sys; sys.modules['torch'] = None; from jobs import submit\n"
        f"try:\n    code = submit.main({options!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'matplotlib', 'h5py', 'numpy', 'scipy'} & {n for n, m in sys.modules.items() if m}\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m jobs.submit" in done.stdout or done.stdout.startswith("#!/bin/bash")


def test_a_dry_run_draws_the_script_that_is_submitted(scheduler, tmp_path, capsys, monkeypatch):
    scheduler("sbatch", "echo 7")
    options = arguments(tmp_path, "frontier", *COMMON, "--set", "scale=mine", "--array", "seeds=0-1")
    assert submit.main([*options, "--dry-run"]) == 0
    drawn = capsys.readouterr().out
    assert "#SBATCH --job-name=graduate_admissions-mine\n" in drawn
    assert submit.main(options) == 0
    [kept] = (tmp_path / "results" / "jobs").glob("*.sh")
    with_comments, others = kept.read_text().splitlines(), drawn.splitlines()
    assert [line for line in with_comments if line[:2] != "# "] == [line for line in others if line[:2] != "# "]


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
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given[-4:] == ["--results", "/scratch/my results", "--set", awkward]


# --- sites


def read_mine(folder, **changes):
    """Reads a site of a user."""
    raw = {"title": "A", "verified": {"by": "never"}, "sources": ["a book"], "scheduler": "slurm", "launcher": "srun"}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (raw | changes).items() if value is not None}))
    return site.read_site(str(path))


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
    with pytest.raises(ValueError, match=r"mine\.yaml: ") as error:
        read_mine(tmp_path, **changes)
    assert message in str(error.value)


def test_what_only_lsf_demands(tmp_path):
    lsf = {"scheduler": "lsf", "launcher": "jsrun"}
    with pytest.raises(ValueError, match="whole minutes for LSF, got 90"):
        read_mine(tmp_path, **lsf, warning={"seconds": 90})
    with pytest.raises(ValueError, match="of which LSF honors one line"):
        read_mine(tmp_path, **lsf, directives=["-alloc_flags NVME"])
    assert read_mine(tmp_path, **lsf).name == "mine"


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
    assert submit.main(arguments(tmp_path, "frontier", *COMMON, "--chain", "3")) == 0
    assert capsys.readouterr().out.split() == ["1", "2", "3"]
    lines = calls.read_text().splitlines()
    [kept] = (tmp_path / "results" / "jobs").glob("graduate_admissions-laptop-*.sh")
    assert lines == [
        f"--parsable {kept}",
        f"--parsable --dependency=afterany:1 {kept}",
        f"--parsable --dependency=afterany:2 {kept}",
    ]
    assert "max_restarts=0" in kept.read_text() and "--no-requeue" in kept.read_text()


def test_lsf_takes_a_file_or_stdin_as_its_site_says(scheduler, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    calls = scheduler("bsub", "echo 'Job <77> is submitted to queue <batch>.'")
    assert submit.main(arguments(tmp_path, "summit", *COMMON)) == 0
    assert calls.read_text().rstrip().endswith(".sh") and not (tmp_path / "stdin").read_text()
    assert submit.main(arguments(tmp_path, "generic-lsf", *COMMON)) == 0
    assert calls.read_text().splitlines()[1] == "" and (tmp_path / "stdin").read_text().startswith("#!/bin/bash")
    assert capsys.readouterr().out.split() == ["77", "77"]


FOREIGN = {
    "SBATCH_ACCOUNT": "other", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXPORT": "NONE",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SRUN_CPUS_PER_TASK": "9",
    "LSB_JOBID": "1", "LSB_DEFAULTQUEUE": "other", "PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0", "PMI2_FD": "3",
    "OMPI_COMM_WORLD_RANK": "0", "JSM_NAMESPACE_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here",
    "CUDA_VISIBLE_DEVICES": "1", "AADL_RESTART_COUNT": "7", "TORCHELASTIC_RUN_ID": "none", "MPI_LOCALRANKID": "0",
    "AADL_END_TIME": "1", "AADL_STOPPED_FILE": "/stopped", "AADL_JOB_ID": "other",
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
    assert submit.main(arguments(tmp_path, site_name, *options)) == 0
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
    assert submit.main(arguments(tmp_path, site_name, *options)) == 0
    refused = "note: LSB_DEFAULTQUEUE, SBATCH_ACCOUNT, SBATCH_EXPORT, SBATCH_NO_REQUEUE, SBATCH_TIMELIMIT of"
    assert refused in capsys.readouterr().err
    lines = (tmp_path / "environment").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    assert not environment.keys() & FOREIGN.keys() and environment["SLURM_CONF"] == "/etc/slurm.conf"


def test_what_the_scheduler_says_is_passed_on(scheduler, tmp_path, capsys, monkeypatch):
    options = arguments(tmp_path, "frontier", *COMMON)
    scheduler("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2", 1)
    assert submit.main(options) == 2
    assert "Invalid account" in capsys.readouterr().err.splitlines()[-1]
    scheduler("sbatch", "echo nonsense")
    assert submit.main(options) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: sbatch refused")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(options) == 2
    assert "sbatch was not found: submit on a login node of frontier" in capsys.readouterr().err


def test_tmpdir_is_refused_on_summit(scheduler, tmp_path, capsys, monkeypatch):
    calls = scheduler("bsub", "echo 'Job <77> is submitted to queue <batch>.'")
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert submit.main(arguments(tmp_path, "summit", *COMMON)) == 2
    assert "TMPDIR must not be set" in capsys.readouterr().err and not calls.exists()


def test_results_that_cannot_be_written_are_one_sentence(tmp_path, capsys):
    (tmp_path / "results").touch()
    assert submit.main(arguments(tmp_path, "frontier", *COMMON)) == 2
    assert "cannot be written" in capsys.readouterr().err


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
    options = arguments(tmp_path, "workstation", "--ranks-per-node", "2", "--set", "variants=sgd")
    assert submit.main([str(config), *options[1:]]) == 0
    run = scaling.read_run(tmp_path / "results" / "graduate_admissions" / "test" / "sgd" / "seed-0.h5")
    assert run.attributes["world_size"] == 2 and run.attributes["launcher"] == "torchrun"
