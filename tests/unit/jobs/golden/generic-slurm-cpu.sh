#!/bin/bash
#SBATCH --job-name=graduate_admissions-laptop
#SBATCH --output='/scratch/my results/jobs/%x-%j.out'
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#
# A cluster with Slurm
# Written by: python -m jobs.submit config.yaml --site generic-slurm --results '/scratch/my results' --time 1-00:00:00 --nodes 2 --ranks-per-node 2
# By hand: sbatch '/scratch/my results/jobs/job.sh'

# What a step or another launcher left in the shell that submitted would change the step of this job.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_STEP@}" "${!SRUN_@}" "${!PMI@}"
cd /home/me/aadl || exit 1
export OMP_NUM_THREADS="1"
# The ranks save and stop by themselves before this time, in seconds since 1970.
export AADL_END_TIME=${SLURM_JOB_END_TIME:-$(($(date +%s) + 86400))}
# Made by rank 0 when the ranks stopped early, to be resumed.
export AADL_STOPPED_FILE='/scratch/my results/jobs'/.stopped-$SLURM_JOB_ID
job=$SLURM_JOB_ID
rm -f "$AADL_STOPPED_FILE"
restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=20

# A signal to this shell alone (--signal=B:) goes on to the ranks: they stop at the same step, save, and exit.
step=
forward() {
    trapped=yes
    [ -z "$step" ] || kill -s "$1" "$step"
}
trap 'forward USR1' USR1
trap 'forward USR2' USR2
trap 'forward TERM' TERM

# A controller that is busy or restarts answers a little later.
patiently() {
    local pause
    for pause in 1 2 4 8; do
        "$@" && return
        sleep "$pause"
    done
    "$@"
}

echo "job $SLURM_JOB_ID, start $((restarts + 1)), nodes $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=1 --export=ALL --kill-on-bad-exit=1 --unbuffered \
    bash jobs/templates/rank.sh /home/me/aadl/.venv/bin/python -m experiments run /home/me/aadl/config.yaml --results '/scratch/my results' &
step=$!
trapped=yes
while [ -n "$trapped" ]; do # a trap ends wait early
    trapped=
    wait "$step"
    code=$?
done

if [ -e "$AADL_STOPPED_FILE" ]; then
    rm -f "$AADL_STOPPED_FILE"
    code=75
    # Not RUNNING: canceled, or out of time; requeueing would undo an scancel. Without an answer the job goes on.
    state=$(patiently squeue --noheader --jobs="$job" --format=%T) || state=RUNNING
    if [ "$restarts" -lt "$max_restarts" ] && [ "$state" = RUNNING ]; then
        echo "stopped early, state saved: requeued (start $((restarts + 1)) of at most $((max_restarts + 1)))"
        patiently scontrol requeue "$job" && exit "$code"
        echo "error: scontrol requeue was refused" >&2
    fi
    echo "stopped early, state saved: the next job of the chain, or sbatch with this script, goes on" >&2
fi
exit "$code"
