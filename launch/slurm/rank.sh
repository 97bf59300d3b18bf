#!/usr/bin/env bash
# One rank: Slurm's names for rank and size become torch's, and rank.py starts the stage.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
[ "$WORLD_SIZE" = 1 ] && unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
exec python "$(dirname "$0")/rank.py" "$@"
