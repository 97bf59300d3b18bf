#!/usr/bin/env bash
# One rank: Slurm's names for rank and size become torch's. If it ends badly, $ALMA_ENDED/rank-N says so before Slurm
# sends SIGTERM to the other ranks, which then know that this is no request to stop (pipeline/train/stop.py).
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
[ "$WORLD_SIZE" = 1 ] && unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
child= got=
for name in TERM USR1 INT HUP; do trap "woken=1 got=$name"'; [ -n "$child" ] && kill -"$got" "$child" 2>/dev/null' "$name"; done
python "$@" &
child=$!
[ -n "$got" ] && kill -"$got" "$child" 2>/dev/null   # it came before there was anything to pass it on to
while :; do   # a trapped signal ends `wait` early; after the end of the process it gives the same code each time
    woken=
    wait "$child"; code=$?
    [ -n "$woken" ] || break
done
case $code in
    0 | 75 | 76) ;;   # done, stopped, left because of another rank
    *) if [ -n "${ALMA_ENDED:-}" ]; then
        echo "$(hostname) $child $code" >"$ALMA_ENDED/.$SLURM_PROCID" && mv "$ALMA_ENDED/.$SLURM_PROCID" "$ALMA_ENDED/rank-$SLURM_PROCID"
    fi ;;
esac
exit "$code"
