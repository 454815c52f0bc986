#!/usr/bin/env bash
# A recipe on several machines without a scheduler, by ssh:
#
#   bash docs/nodes.sh "node1 node2" recipes/qwenimage_fulltune full --train_data_dir /data/mine
#   LAUNCH=fsdp2 NPROC=8 bash docs/nodes.sh "node1 node2" recipes/qwenimage_fulltune full --train_data_dir /data/mine
#
# The machines reach each other, ssh asks no password, and this repository and the data lie under the same path on all. The first
# one is the main one: outputs/ must be where all see it. LAUNCH, NPROC, MASTER_PORT and what SEND names are passed on.
# Ctrl-C, TERM, HUP or USR1 here asks all to finish their step and save; the exit code is then 75, and the same command
# with --resume_from_checkpoint latest goes on. Otherwise it is the first machine's, or another's that failed.
set -uo pipefail
[[ $# -ge 2 && -f $2/run.sh ]] || { echo "nodes.sh: \"HOST HOST ...\" recipes/NAME [CONFIG] [--flag value ...]" >&2; exit 2; }
read -ra hosts <<<"$1"
recipe=$(cd "$2" && pwd)
shift 2
settings=(NNODES="${#hosts[@]}" MASTER_ADDR="${hosts[0]}" MASTER_PORT="${MASTER_PORT:-29500}")
for name in LAUNCH NPROC ${SEND-}; do
    if [[ -n ${!name-} ]]; then settings+=("$name=${!name}"); fi
done
mark=finetune-$(hostname)-$$   # of this run, in a file on each machine: whom to ask to stop
quoted() { printf '%q ' "$@"; }

jobs=()
for rank in "${!hosts[@]}"; do
    command="echo \$\$ > /tmp/$mark-$rank.pid; exec env $(quoted "${settings[@]}" NODE_RANK="$rank" bash "$recipe/run.sh" "$@")"
    # without our signals: run.sh over there is asked, and ssh waits until it has saved
    (trap '' INT HUP TERM USR1; exec ssh -n "${hosts[rank]}" "$command") > >(sed -u "s/^/[$rank] /") 2>&1 &
    jobs+=($!)
done
asked=
stop() {
    [[ -z $asked ]] || return 0
    asked=1
    echo "nodes.sh: asking all machines to save and stop" >&2
    for rank in "${!hosts[@]}"; do
        ssh -n "${hosts[rank]}" "kill -USR1 \$(cat /tmp/$mark-$rank.pid)" 2>/dev/null &
    done
}
until_done() {   # wait for a job, whose code it returns; a signal ends bash's wait, too
    local ended=0 again=0
    while kill -0 "$1" 2>/dev/null; do wait "$1" && ended=0 || ended=$?; done
    if [[ $ended == 0 || $ended -gt 128 ]]; then wait "$1" 2>/dev/null && again=0 || again=$?; fi
    return $((again == 0 || again == 127 ? ended : again))
}
trap stop INT TERM HUP USR1
code=0
for rank in "${!hosts[@]}"; do
    until_done "${jobs[rank]}" && ended=0 || ended=$?
    if [[ $ended != 0 && $code == 0 ]]; then code=$ended; fi
    ssh -n "${hosts[rank]}" "rm -f /tmp/$mark-$rank.pid" 2>/dev/null
done
exit "$code"
