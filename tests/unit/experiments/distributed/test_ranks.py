import launched
import pytest

from experiments.distributed.nodes import expand_nodelist, tasks_per_node
from experiments.distributed.ranks import Ranks, ranks_from_environment

COMMAND = ["python", "-m", "experiments", "run", "my config.yaml"]


def no_mpi():
    raise AssertionError("MPI must not be asked")


def read(env, mpi=no_mpi):
    return ranks_from_environment(env, command=COMMAND, mpi=mpi)


TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "MASTER_ADDR": "node01", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "ab12", "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}
JSRUN = {
    "JSM_NAMESPACE_RANK": "7", "JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "6", "OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "12",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "6", "PMIX_RANK": "7", "LSB_JOBID": "331",
    "LSB_JOBINDEX": "0", "LSB_MCPU_HOSTS": "batch4 1 d29n14 42 d29n15 42",
}  # fmt: skip
# The third node of a job of three, which has six tasks: a step of two tasks on the last two nodes.
SRUN = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "node[02-03]", "SLURM_JOB_NODELIST": "node[01-03]", "SLURM_NODELIST": "node[01-03]",
    "SLURM_JOB_NUM_NODES": "3", "SLURMD_NODENAME": "node03", "SLURM_RESTART_COUNT": "1",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1", "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-vm-6041@1", "PRTE_LAUNCHED": "1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PBS_JOBID": "17.server"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
PMIX = {"PMIX_RANK": "1", "PMIX_NAMESPACE": "space"}
# What a batch script inherits that was submitted from within mpiexec.
LEAKED = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
# A task of an interactive shell, which is a step of one task.
OF_SHELL = {"PMI_RANK": "0", "PMI_SIZE": "1"}
SHELL = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"HOME": "/"}, Ranks()),
        ({"MASTER_ADDR": "host", "MASTER_PORT": "1"}, Ranks()),
        (TORCHRUN, Ranks(3, 4, 1, "node01", 29400, "torchrun", 2, 1, restart_count=2, job_id="ab12", agent_store=True)),
        (BY_HAND, Ranks(3, 4, 1, "node01", 29500, "env", local_size=0, node_rank=-1)),
        (JSRUN, Ranks(7, 12, 1, launcher="jsrun", local_size=6, node_rank=-1, scheduler="lsf", job_id="331")),
        (
            SRUN,
            Ranks(1, 2, 0, "", 0, "srun", 1, 1, "node03", 1, "slurm", "41", "1", ("node02", "node03"), job_restarts=1),
        ),
        (OPENMPI, Ranks(1, 2, 1, launcher="openmpi", local_size=2, node_rank=-1, step_id="prterun-vm-6041@1")),
        (MPICH, Ranks(1, 2, 1, launcher="mpich", local_size=2, node_rank=-1)),
        (PALS, Ranks(5, 8, 1, launcher="mpich", local_size=0, node_rank=-1, scheduler="pbs", job_id="17.server")),
        (MVAPICH, Ranks(1, 2, 1, launcher="mvapich", local_size=2, node_rank=-1)),
        (SHELL, Ranks(launcher="srun", local_size=0, scheduler="slurm", job_id="41", step_id="0")),
    ],
    ids=[
        "nothing", "exported master", "torchrun", "env", "jsrun", "srun", "openmpi", "mpich", "pals", "mvapich", "shell"
    ],
)  # fmt: skip
def test_each_launcher(env, expected):
    assert read(env) == expected


def test_only_mpi_knows_the_number_of_ranks_under_pmix():
    ranks = read(PMIX, lambda: (1, 6, 1, 2))
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_size, ranks.launcher) == (1, 6, 1, 2, "pmix")
    with pytest.raises(ValueError, match=r"PMIX_RANK=1 but MPI.COMM_WORLD has rank 0 of 1: mpi4py uses another MPI"):
        read(PMIX, lambda: (0, 1, 0, 1))
    assert read({"AADL_LAUNCHER": "mpi4py"}, lambda: (1, 2, 0, 1)).launcher == "mpi4py"


@pytest.mark.parametrize(
    ("env", "launcher", "rank"),
    [
        (SHELL | OPENMPI, "openmpi", 1),  # mpiexec in an interactive shell
        (SHELL | MPICH, "mpich", 1),
        (SHELL | MVAPICH, "mvapich", 1),
        # mpiexec starts its daemons by srun, one a node, and their children inherit the numbers of the daemon's step
        (SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"} | OPENMPI, "openmpi", 1),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"} | MPICH, "mpich", 1),
        (SRUN | TORCHRUN, "torchrun", 3),  # srun torchrun: one agent a node
        (OPENMPI | TORCHRUN, "torchrun", 3),
        (SRUN | {"PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_RANK": "1"}, "srun", 1),  # srun --mpi=pmi2 and --mpi=pmix
        # What srun --pty leaves in its shell, where PMI counts one task: mpirun or another srun spawned the ranks
        (SHELL | OF_SHELL | OPENMPI, "openmpi", 1),
        (SHELL | OF_SHELL | MVAPICH, "mvapich", 1),
        (OF_SHELL | OPENMPI, "openmpi", 1),
        (SRUN | OF_SHELL, "srun", 1),
        # The export of a job script whose ranks have the numbers of srun or mpiexec
        (SRUN | {"WORLD_SIZE": "2", "MASTER_ADDR": "node02", "MASTER_PORT": "29500"}, "srun", 1),
        (OPENMPI | {"WORLD_SIZE": "2"}, "openmpi", 1),
        (JSRUN | {"WORLD_SIZE": "12"}, "jsrun", 7),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "single process", 0),
        (OPENMPI | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "openmpi", 1),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "host7 1"}, "single process", 0),
        (OPENMPI | {"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "host7 2"}, "openmpi", 1),
    ],
)
def test_the_innermost_spawner_decides(env, launcher, rank):
    ranks = read(env)
    assert (ranks.launcher, ranks.rank) == (launcher, rank)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (JSRUN | {"OMPI_COMM_WORLD_SIZE": "1"}, "JSM_NAMESPACE_SIZE=12 and OMPI_COMM_WORLD_SIZE=1 contradict"),
        (JSRUN | {"PMIX_RANK": "3"}, "JSM_NAMESPACE_RANK=7 and PMIX_RANK=3 contradict"),
        (SRUN | {"PMI_RANK": "0", "PMI_SIZE": "2"}, "SLURM_PROCID=1 and PMI_RANK=0 contradict"),
        (SRUN | LEAKED, "SLURM_PROCID=1 and OMPI_COMM_WORLD_RANK=0"),
        (SRUN | {"PMIX_RANK": "0"}, "SLURM_PROCID=1 and PMIX_RANK=0 contradict"),
        (SRUN | BY_HAND | {"RANK": "0", "LOCAL_RANK": "0"}, "RANK=0 and SLURM_PROCID=1 contradict .*inside the task"),
        (SRUN | BY_HAND | {"RANK": "1"}, "WORLD_SIZE=4 and SLURM_STEP_NUM_TASKS=2 contradict"),
        (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 and SLURM_STEP_NUM_TASKS=2 contradict .*unset WORLD_SIZE, because"),
        (SRUN | {"RANK": "0"}, "variables WORLD_SIZE, .* are missing although RANK is set; unset RANK, because srun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "variables LOCAL_.*PORT are missing although RANK and WORLD_SIZE are set"),
        # srun -n 2 mpirun -n 1: which one spawned the ranks, or left its variables, nobody can know
        (SRUN | LEAKED | {"PRTE_LAUNCHED": "1"}, "contradict each other"),
        (MPICH | BY_HAND, "RANK=3 and PMI_RANK=1 contradict"),
        (OPENMPI | MPICH | {"PMI_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=2 and PMI_SIZE=4 contradict"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, r"SLURM_STEP_TASKS_PER_NODE=2\(x2\) counts 4 tasks, but .*=2"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2 must be below the 2 nodes"),
        (SRUN | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1 must be below the 1 ranks of this node"),
        (SRUN | {"SLURM_PROCID": "2"}, "SLURM_PROCID=2 must be below SLURM_STEP_NUM_TASKS=2"),
        (SRUN | {"SLURM_PROCID": "-1"}, "SLURM_PROCID must be an integer >= 0, got '-1'"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE must be an integer >= 1, got ''"),
        (JSRUN | {"JSM_NAMESPACE_LOCAL_SIZE": "13"}, "13 ranks of this node must not exceed JSM_NAMESPACE_SIZE=12"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID or PALS_LOCAL_RANKID or PMI_LOCAL_RANK is missing"),
        (BY_HAND | {"RANK": "x"}, "RANK must be an integer >= 0, got 'x'"),
        (BY_HAND | {"LOCAL_RANK": "7"}, "LOCAL_RANK=7 must not exceed RANK=3"),
        (BY_HAND | {"MASTER_PORT": "70000"}, r"MASTER_PORT must be an integer in \[1, 65535\]"),
        (BY_HAND | {"MASTER_ADDR": ""}, "MASTER_ADDR must name the host"),
        ({"AADL_LAUNCHER": "slurm"}, "AADL_LAUNCHER must be one of torchrun, env, srun, .*, got 'slurm'"),
        ({"AADL_LAUNCHER": "srun"}, "AADL_LAUNCHER=srun needs SLURM_STEP_ID"),
        ({"AADL_LAUNCHER": "srun", "SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, "AADL_LAUNCHER=srun needs SLURM_STEP_ID"),
        ({"AADL_LAUNCHER": "mpich"}, "AADL_LAUNCHER=mpich needs PMI_RANK and PMI_SIZE"),
        (MPICH | {"AADL_MASTER_PORT": "0"}, "AADL_MASTER_PORT must be an integer >= 1"),
    ],
)
def test_a_contradiction_names_both_values(env, message):
    with pytest.raises(ValueError, match=message):
        read(env)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_a_missing_variable_is_named(name):
    with pytest.raises(ValueError, match=rf"environment variable {name} is missing .*torchrun sets all of"):
        read({key: value for key, value in BY_HAND.items() if key != name})


def test_restarts_of_the_job_are_counted_without_those_of_torchrun():
    ranks = read(TORCHRUN | {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "1"})
    assert (ranks.restart_count, ranks.job_restarts) == (3, 1)


def test_elements_of_an_lsf_array_are_different_jobs():
    assert read(JSRUN | {"LSB_JOBINDEX": "3"}).job_id == "331_3"


def test_the_variables_of_the_suite_win():
    given = {"AADL_MASTER_ADDRESS": "node09", "AADL_MASTER_PORT": "4711"}
    assert read(SRUN | given | {"AADL_LAUNCHER": "srun"}).master_address == "node09"
    assert read(MPICH | given).master_port == 4711 and read(BY_HAND | given).master_address == "node09"
    assert read(TORCHRUN | given).master_address == "node01"  # where its agent holds the store
    assert read(MPICH | {"AADL_JOB_ID": "mine", "AADL_RESTART_COUNT": "3"}).job_id == "mine"
    assert read(SRUN | {"AADL_RESTART_COUNT": "3"}).restart_count == 3
    assert read(SRUN | {"AADL_RESTART_COUNT": "3"}).job_restarts == 3
    leaked = SRUN | LEAKED
    assert read(leaked | {"AADL_LAUNCHER": "srun"}).rank == 1
    assert read(leaked | {"AADL_LAUNCHER": "openmpi"}).world_size == 1
    assert read(SRUN | BY_HAND | {"AADL_LAUNCHER": "env"}).world_size == 4


# What a batch script sees without srun or jsrun.
SLURM_BATCH = {
    "SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "6",
    "SLURM_NPROCS": "6", "SLURM_JOB_NUM_NODES": "3",
}  # fmt: skip
LONG_LIST = "batch4 1 " + " ".join(f"d{number:02}n14 42" for number in range(256))


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (SLURM_BATCH, "`srun -N 3 -n 6 --kill-on-bad-exit=1 python -m experiments run 'my config.yaml'`"),
        (SLURM_BATCH | {"SLURM_STEP_ID": "4294967291"}, "srun -N 3 -n 6 "),  # the batch step of newer versions
        (SLURM_BATCH | {"SLURM_CPUS_PER_TASK": "7"}, "srun -N 3 -n 6 -c 7 "),
        ({"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2"}, "srun -N 2 -n 2 "),
        (
            {"LSB_JOBID": "331", "LSB_MCPU_HOSTS": "batch4 1 d29n14 42 d29n15 42"},
            "`jsrun -n 2 -r 1 -a 6 -c 42 -g 6 -b packed:7 -d packed python -m experiments run 'my config.yaml'`",
        ),
        ({"LSB_JOBID": "331", "LSB_MCPU_HOSTS": LONG_LIST}, "jsrun -n 256 -r 1 -a 6 "),
        ({"LSB_JOBID": "331", "LSB_HOSTS": "batch4 d29n14 d29n14 d29n15 d29n15"}, "jsrun -n 2 -r 1 -a 2 -c 2 "),
        ({"LSB_JOBID": "331", "LSB_MCPU_HOSTS": "host7 4 host8 4"}, "mpiexec -n 8 python -m experiments run"),
        ({"LSB_JOBID": "331", "LSB_MCPU_HOSTS": "host7 1 host8 4"}, "mpiexec -n 5 "),  # host7 is no launch node
        ({"LSB_JOBID": "331", "LSB_MCPU_HOSTS": "login1 4 host8 4"}, "mpiexec -n 8 "),  # nor is one with slots
        ({"LSB_JOBID": "331", "LSB_DJOB_NUMPROC": "8"}, "mpiexec -n 8 "),
    ],
)
def test_a_batch_shell_is_refused_with_the_line_to_type(env, line):
    with pytest.raises(ValueError, match=r"is the batch shell of .*, not one of its tasks: start with") as refused:
        read(env)
    assert line in str(refused.value)
    with pytest.raises(ValueError, match="AADL_LAUNCHER=env to trust RANK"):
        read(env | BY_HAND | {"RANK": "0", "LOCAL_RANK": "0"})  # RANK of a batch script, the same for all
    assert read(env | {"AADL_LAUNCHER": "single"}).world_size == 1


def test_the_tasks_of_a_step_follow_its_layout():
    """4 + 1 + 1 tasks: the size of a node is neither the mean nor what SLURM_NTASKS_PER_NODE was for the job."""
    found = [read(launched.srun_variables(rank, 6, layout=[4, 1, 1], nodes="n[1-3]")) for rank in range(6)]
    places = [(ranks.node_rank, ranks.local_rank, ranks.local_size) for ranks in found]
    assert places == [(0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 0, 1), (2, 0, 1)]
    assert found[0].hosts == ("n1",) * 4 + ("n2", "n3")
    assert read(launched.srun_variables(0, 6, layout=[4, 2]) | {"SLURM_DISTRIBUTION": "cyclic"}).hosts == ()


@pytest.mark.parametrize(("text", "counts"), [("", []), ("4", [4]), ("4,1(x2)", [4, 1, 1]), ("2(x3),1", [2, 2, 2, 1])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text, "NAME") == counts


@pytest.mark.parametrize("text", ["4,", "x", "0", "4(x0)", "4(2)", "4(x2", "1(x99999999)"])
def test_tasks_per_node_of_another_grammar(text):
    with pytest.raises(ValueError, match="NAME must be counts such as"):
        tasks_per_node(text, "NAME")


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b,c", ["a", "b", "c"]),
        ("n[1-3,5,008-010]", ["n1", "n2", "n3", "n5", "n008", "n009", "n010"]),
        ("p[1-2]q[3-4]", ["p1q3", "p1q4", "p2q3", "p2q4"]),
        ("r1n[01-02],gpu7", ["r1n01", "r1n02", "gpu7"]),
        ("node-1.cluster.edu,node-2.cluster.edu", ["node-1.cluster.edu", "node-2.cluster.edu"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
    ],
)
def test_nodelist(text, nodes):
    assert expand_nodelist(text) == nodes


@pytest.mark.parametrize("text", ["n[a-b]", "n[]", "n[-2]"])
def test_no_nodelist(text):
    """The hosts are a hint for messages: without a list that can be read there is none."""
    with pytest.raises(ValueError, match="invalid literal"):
        expand_nodelist(text)
    assert read(launched.srun_variables(0, 2, layout=[2], nodes=text)).hosts == ()
