#!/usr/bin/env bash
# Wait for a job of serve.sh and say how to reach it: hack/slurm/connect.sh [NUMBER]
#
# NUMBER is that of the last job if not given. LOGIN_HOST is what your own machine calls the login node
# (this machine's name), LOCAL_PORT the port to have there (8080), WAIT_SECONDS the longest to wait
# (3600).
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit ;; esac
state=${VDIFF_SLURM_DIR:-$HOME/.cache/vdiff-slurm}
number=${1:-$(cat "$state/latest" 2>/dev/null || true)}
[ -n "$number" ] || { echo "connect.sh: no job in $state; start one with serve.sh" >&2 && exit 2; }
log=$state/$number.log
login=${LOGIN_HOST:-$(hostname -f)}
local_port=${LOCAL_PORT:-8080}
deadline=$((SECONDS + ${WAIT_SECONDS:-3600}))

ready() { sed -nE 's|^.* is ready at https?://[^ ]*:([0-9]+)("})?$|\1|p' "$log" 2>/dev/null | tail -n 1; }
in_state() { squeue --noheader --jobs "$number" --format %T 2>/dev/null || true; }

said=
until port=$(ready) && [ -n "$port" ]; do
    now=$(in_state)
    case $now in
        PENDING | CONFIGURING | RUNNING) ;;
        *)
            echo "job $number has ended (${now:-no longer queued}); the end of $log:" >&2
            tail -n 20 "$log" >&2 2>/dev/null || true
            exit 1
            ;;
    esac
    [ "$SECONDS" -lt "$deadline" ] || { echo "job $number is still not ready: $now" >&2 && exit 1; }
    [ "$now" = "$said" ] || echo "job $number: $now" >&2
    said=$now
    sleep 2
done

node=$(sed -nE 's/^node (.+)$/\1/p' "$log" | head -n 1)
cat <<END
The model is ready on $node, port $port.

On your own machine:
  ssh -N -L $local_port:$node:$port $USER@$login

and then in another terminal there:
  curl http://localhost:$local_port/v1/models

From the cluster:
  http://$node:$port

To stop it:
  scancel $number
END
