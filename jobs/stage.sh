#!/bin/bash
# Copies to the node's own disk, once a node: stage.sh environment ARCHIVE FOLDER | stage.sh data SOURCE FOLDER
# FOLDER appears only when the copy is whole, and is left alone when an earlier start of the job made it on this node.
set -eu

kind=$1 source=$2 folder=$3
[ ! -d "$folder" ] || exit 0
mkdir -p "$(dirname "$folder")"
temporary=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$temporary"' EXIT

if [ "$kind" = environment ]; then
    tar -xzf "$source" -C "$temporary"
else
    cp -R "$source"/. "$temporary"
fi
mv -T "$temporary" "$folder" 2>/dev/null || [ -d "$folder" ] # another job on this node was faster
if [ -x "$folder/bin/conda-unpack" ]; then # the paths in a packed conda environment
    "$folder/bin/conda-unpack"
fi
