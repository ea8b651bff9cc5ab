#!/bin/bash
# Copies to the node's own disk, once a node: stage.sh environment ARCHIVE FOLDER | stage.sh data SOURCE FOLDER
# The file FOLDER.staged is made last. With it FOLDER is whole, and a later start of the job on this node leaves it
# alone; without it FOLDER is what a killed start left, and is made again. No temporary folder is renamed at the end,
# because conda-unpack must run in the folder's final place.
set -eu

kind=$1 source=$2 folder=$3
above=$(dirname "$folder")
mkdir -p "$above"
exec 9<"$above"
flock 9 # jobs that share the node take turns
[ ! -d "$folder" ] || [ ! -e "$folder.staged" ] || exit 0
rm -rf "$folder.staged" "$folder"
trap '[ -e "$folder.staged" ] || rm -rf "$folder"' EXIT

mkdir "$folder"
if [ "$kind" = environment ]; then
    tar -xzf "$source" -C "$folder"
    if [ -x "$folder/bin/conda-unpack" ]; then # the paths in a packed conda environment
        "$folder/bin/conda-unpack"
    fi
else
    cp -R "$source"/. "$folder"
fi
: >"$folder.staged"
