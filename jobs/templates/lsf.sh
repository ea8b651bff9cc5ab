#!/bin/bash
@{directives}
#
# @{title}
# Written by: @{command}
# By hand: bsub @{script}

# What another launcher left in the shell that submitted would be taken for this job's.
unset "${!PMI@@}" "${!OMPI_COMM_WORLD@@}" "${!JSM_@@}"
cd @{checkout} || exit 1
@{setup}
# The ranks save and stop by themselves before this time, in seconds since 1970.
export AADL_END_TIME=$(($(date +%s) + @{seconds}))
# Made by rank 0 when the ranks stopped early, to be resumed.
export AADL_STOPPED_FILE=@{jobs}/.stopped-$LSB_JOBID-${LSB_JOBINDEX:-0}
job=@{job_id}
rm -f "$AADL_STOPPED_FILE"
# LSF does not count the starts of a job, which keeps its id when it is requeued: one line a start.
starts=@{jobs}/.starts-$LSB_JOBID-${LSB_JOBINDEX:-0}
echo "$HOSTNAME" >>"$starts"
restarts=$(($(wc -l <"$starts") - 1))
export AADL_RESTART_COUNT=$restarts
max_restarts=@{max_restarts}
@{stage}
@{seed}
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
(trap '' USR1 USR2 && exec @{launch}) &
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
