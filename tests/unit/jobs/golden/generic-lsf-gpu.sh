#!/bin/bash
#BSUB -J graduate_admissions-laptop
#BSUB -o '/scratch/my results/jobs/graduate_admissions-laptop-%J.out'
#BSUB -W 2:00
#BSUB -wt 5
#BSUB -wa USR2
#BSUB -P ABC123
#BSUB -q normal
#BSUB -n 64
#BSUB -R "span[ptile=32]"
#BSUB -gpu "num=4:mode=shared"
#
# A cluster with LSF and Open MPI
# Written by: python -m jobs.submit config.yaml --site generic-lsf --results '/scratch/my results' --account ABC123 --time 2:00:00 --nodes 2 --ranks-per-node 4 --cores-per-rank 8 --gpus-per-node 4 --queue normal
# By hand: bsub < '/scratch/my results/jobs/job.sh'

# What another launcher left in the shell that submitted would be taken for this job's.
unset "${!PMI@}" "${!OMPI_COMM_WORLD@}" "${!JSM_@}"
cd /home/me/aadl || exit 1
export OMP_NUM_THREADS="8"
# The ranks save and stop by themselves before this time, in seconds since 1970.
export AADL_END_TIME=$(($(date +%s) + 7200))
# Made by rank 0 when the ranks stopped early, to be resumed.
export AADL_STOPPED_FILE='/scratch/my results/jobs'/.stopped-$LSB_JOBID-${LSB_JOBINDEX:-0}
job=$LSB_JOBID
rm -f "$AADL_STOPPED_FILE"
# LSF does not count the starts of a job, which keeps its id when it is requeued: one line a start.
starts='/scratch/my results/jobs'/.starts-$LSB_JOBID-${LSB_JOBINDEX:-0}
echo "$HOSTNAME" >>"$starts"
restarts=$(($(wc -l <"$starts") - 1))
export AADL_RESTART_COUNT=$restarts
max_restarts=20

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
(trap '' USR1 USR2 && exec mpirun -np 8 --map-by ppr:4:node:pe=8 -x AADL_END_TIME -x AADL_STOPPED_FILE -x AADL_RESTART_COUNT -x OMP_NUM_THREADS ${AADL_DATA_DIR:+-x AADL_DATA_DIR} ${AADL_IMAGENET_DIR:+-x AADL_IMAGENET_DIR} \
    bash jobs/templates/rank.sh /home/me/aadl/.venv/bin/python -m experiments run /home/me/aadl/config.yaml --results '/scratch/my results') &
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
