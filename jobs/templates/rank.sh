#!/bin/bash
# Starts one rank: rank.sh COMMAND... The launcher of the job script runs this on every core set.
#
# Exit code 75 means "stopped early, state saved, start me again". To a launcher that ends the job when a rank fails it
# looks like a crash, and the first rank to leave would take the others with it. So 75 becomes 0 here, and rank 0 leaves
# a file that the job script looks for.

# The program answers these signals once it is up; until then they must not kill it, nor a helper process of it later.
trap '' USR1 USR2
# With a trap, bash waits for the program to save and end; without, it would die at once.
trap : TERM

"$@"
code=$?

if [ "$code" -eq 75 ]; then
    rank=${SLURM_PROCID:-${JSM_NAMESPACE_RANK:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}}}
    [ "$rank" -ne 0 ] || : >"$AADL_STOPPED_FILE"
    exit 0
fi
exit "$code"
