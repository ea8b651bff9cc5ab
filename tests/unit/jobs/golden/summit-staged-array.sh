#!/bin/bash
#BSUB -J "graduate_admissions-laptop[1-10]"
#BSUB -o '/scratch/my results/jobs/graduate_admissions-laptop-%J.%I.out'
#BSUB -W 2:00
#BSUB -wt 5
#BSUB -wa USR2
#BSUB -alloc_flags "smt1 NVME"
#BSUB -P ABC123
#BSUB -q batch
#BSUB -nnodes 2
#
# Summit (Oak Ridge): IBM AC922 nodes with 2 POWER9 and 6 V100, LSF and jsrun
# Written by: python -m jobs.submit config.yaml --site summit --results '/scratch/my results' --account ABC123 --time 2:00:00 --nodes 2 --array seeds=0-9 --stage-data /scratch/data
# By hand: bsub '/scratch/my results/jobs/job.sh'

# What another launcher left in the shell that submitted would be taken for this job's.
unset "${!PMI@}" "${!OMPI_COMM_WORLD@}" "${!JSM_@}"
cd /home/me/aadl || exit 1
source /etc/profile
module load open-ce/1.10.0-py39-ibm
export OMP_NUM_THREADS="7"
export NCCL_SOCKET_IFNAME="ib0"
export GLOO_SOCKET_IFNAME="ib0"
export IBV_FORK_SAFE="1"
export RDMAV_FORK_SAFE="1"
# The ranks save and stop by themselves before this time, in seconds since 1970.
export AADL_END_TIME=$(($(date +%s) + 7200))
# Made by rank 0 when the ranks stopped early, to be resumed.
export AADL_STOPPED_FILE='/scratch/my results/jobs'/.stopped-$LSB_JOBID-${LSB_JOBINDEX:-0}
job="$LSB_JOBID[$LSB_JOBINDEX]"
rm -f "$AADL_STOPPED_FILE"
# LSF does not count the starts of a job, which keeps its id when it is requeued: one line a start.
starts='/scratch/my results/jobs'/.starts-$LSB_JOBID-${LSB_JOBINDEX:-0}
echo "$HOSTNAME" >>"$starts"
restarts=$(($(wc -l <"$starts") - 1))
export AADL_RESTART_COUNT=$restarts
max_restarts=20
# To the disk of each node: thousands of ranks that read the same files are slow on a shared file system.
jsrun -n 2 -r 1 -a 1 -c 1 bash jobs/templates/stage.sh data /scratch/data "/mnt/bb/$USER/data" || exit 1
export AADL_DATA_DIR="/mnt/bb/$USER/data"
export AADL_IMAGENET_DIR="/mnt/bb/$USER/data"
seeds=(0 1 2 3 4 5 6 7 8 9)
seed=${seeds[LSB_JOBINDEX - 1]}
# A signal to this shell goes on to the ranks: they stop at the same step, save, and exit. Launchers that pass on no
# signal do no harm: the ranks mind the time themselves. INT and TERM are bkill's: then the job must not come back.
step=
killed=
forward() {
    trapped=yes
    [ -z "$step" ] || kill -s "$1" "$step"
}
trap 'forward USR1' USR1
trap 'forward USR2' USR2
trap 'killed=yes trapped=yes' INT
trap 'killed=yes; forward TERM' TERM

echo "job $LSB_JOBID, start $((restarts + 1)), $(date -u +%FT%TZ)"
# -wa and bkill signal the launcher too, which must not die of it.
(trap '' USR1 USR2 && exec jsrun -n 2 -r 1 -a 6 -c 42 -g 6 -b packed:7 -d packed -X 1 -E OMP_NUM_THREADS=7 --smpiargs="-disable_gpu_hooks" \
    bash jobs/templates/rank.sh /home/me/aadl/.venv/bin/python -m experiments run /home/me/aadl/config.yaml --results '/scratch/my results' --set "seeds=$seed") &
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
    if [ -z "$killed" ] && [ "$restarts" -lt "$max_restarts" ]; then
        echo "stopped early, state saved: requeued (start $((restarts + 1)) of at most $((max_restarts + 1)))"
        for pause in 1 2 4 8 0; do # a daemon that is busy or restarts answers a little later
            [ -z "$killed" ] && brequeue "$job" && exit "$code"
            sleep "$pause"
        done
        echo "error: brequeue was refused" >&2
    fi
    echo "stopped early, state saved: the next job of the chain, or bsub with this script, goes on" >&2
else
    rm -f "$starts"
fi
exit "$code"
