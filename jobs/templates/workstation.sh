#!/bin/bash
# @{title}
# Written by: @{command}
# By hand: bash @{script}

cd @{checkout} || exit 1
@{setup}
@{deadline}
@{seed}
exec @{launch}
