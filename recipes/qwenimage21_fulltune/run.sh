#!/usr/bin/env bash
# run.sh [CONFIG] [--flag value ...]   CONFIG: a name in configs/ or a path to a YAML; tiny when none is given
# run.sh --list                        the configs: hardware, memory and speed, as their headers say
# run.sh CONFIG --plan [--gpus 4x24]   what it needs, what fits; no data, no download, nothing is written
# run.sh CONFIG --dry_run              checks the data, draws the first micro-batch, measures its losses: dry_run.html
# run.sh --help                        every flag with its help
# LAUNCH=NAME    a file of accelerate/ (single, ddp, fsdp2, zero3_offload, ...) in place of the one that CONFIG names
# NPROC=N        processes on this machine; else one a visible GPU (no GPU: 2); single is always 1
# NNODES=N NODE_RANK=I MASTER_ADDR=HOST [MASTER_PORT=29500]   several machines: the same command on each
set -euo pipefail
die() { echo "run.sh: $*" >&2; exit 2; }
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$recipe
until [[ -d $root/common && -f $root/setup.sh ]]; do
    [[ $root != / ]] || die "no folder above $recipe has common/ and setup.sh: a recipe runs inside the repository"
    root=$(dirname "$root")
done
names() { (cd "$1" && printf '%s ' *.yaml | sed 's/\.yaml//g'); }

if [[ ${1-} == --list ]]; then
    for file in "$recipe"/configs/*.yaml; do   # the header: lines of comment before the first setting
        printf '\n%s\n' "$(basename "$file" .yaml)"
        sed -n '/^#/!q; s/^# */    /p' "$file"
    done
    exit 0
fi

# ---- config and launch file ----
config=tiny
if [[ $# -gt 0 && $1 != -* ]]; then config=$1; shift; fi
if [[ -f $recipe/configs/$config.yaml ]]; then yaml=$recipe/configs/$config.yaml
elif [[ -f $config ]]; then yaml=$(cd "$(dirname "$config")" && pwd)/$(basename "$config")
else die "no config '$config': neither a file nor one of: $(names "$recipe/configs")"; fi
LAUNCH=${LAUNCH:-$(sed -n "s/^launch:[[:space:]]*[\"']\{0,1\}\([A-Za-z0-9_.-]*\).*/\1/p" "$yaml")}
export LAUNCH=${LAUNCH:-single}
[[ -f $recipe/accelerate/$LAUNCH.yaml ]] || die "no launch file '$LAUNCH', there are: $(names "$recipe/accelerate")"
kind=$(sed -n "s/^distributed_type:[[:space:]]*'\{0,1\}\([A-Z_]*\).*/\1/p" "$recipe/accelerate/$LAUNCH.yaml")

whole() { [[ -z ${!1-} || ${!1} =~ ^(0|[1-9][0-9]{0,4})$ && ${!1} -ge $2 && ${!1} -le $3 ]] ||
    die "$1 is '${!1}', expected a whole number from $2 to $3"; }
whole NPROC 1 256; whole NNODES 1 9999; whole NODE_RANK 0 $((${NNODES:-1} - 1)); whole MASTER_PORT 0 65535

# ---- Python, this machine ----
python=$(bash "$root/setup.sh")
export PATH="$(dirname "$python"):$PATH"   # DeepSpeed calls ninja
for arg; do [[ $arg != -h && $arg != --help ]] || exec "$python" "$recipe/train.py" --config "$yaml" --help; done
probe='import os, re, subprocess, torch
toolkit = "none"
if torch.cuda.is_available():
    from torch.utils.cpp_extension import CUDA_HOME
    if CUDA_HOME and os.access(f"{CUDA_HOME}/bin/nvcc", os.X_OK):
        said = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "-V"], capture_output=True, text=True).stdout
        toolkit = "".join(re.findall(r"release ([0-9.]+)", said)) or "none"
print(torch.cuda.device_count(), os.cpu_count(), torch.version.cuda or "none", toolkit)'
read -r gpus cores torch_cuda toolkit < <("$python" -c "$probe")
NNODES=${NNODES:-1}
if [[ $kind == NO ]]; then default=1; elif [[ $gpus -gt 0 ]]; then default=$gpus; else default=2; fi
NPROC=${NPROC:-$default}
world=$((NPROC * NNODES))
if [[ $kind == NO && $world -gt 1 ]]; then
    die "launch file '$LAUNCH' is for one process, got NPROC=$NPROC NNODES=$NNODES; take LAUNCH=ddp or LAUNCH=fsdp2"
elif [[ $kind == MULTI_GPU && $world -eq 1 ]]; then
    echo "run.sh: one process, so launch file 'single' instead of '$LAUNCH'"
    LAUNCH=single
elif [[ $kind == DEEPSPEED && $gpus -eq 0 ]]; then
    export DS_ACCELERATOR=cpu
elif [[ $kind == DEEPSPEED && $toolkit != "$torch_cuda" && -z ${DS_SKIP_CUDA_CHECK-} ]]; then
    echo "run.sh: CUDA toolkit $toolkit, torch is for $torch_cuda: DS_SKIP_CUDA_CHECK=1, so that DeepSpeed compiles"
    export DS_SKIP_CUDA_CHECK=1
fi
if [[ $gpus -eq 0 ]]; then threads=1; else threads=$((cores > NPROC ? cores / NPROC : 1)); fi   # tiny tensors: one is fastest
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
place=(--num_machines "$NNODES" --machine_rank "${NODE_RANK:-0}")
if [[ $NNODES -eq 1 ]]; then
    place+=(--main_process_port "${MASTER_PORT:-0}")   # 0: any free one
else
    [[ -n ${MASTER_ADDR-} && -n ${NODE_RANK-} ]] || die "NNODES=$NNODES needs MASTER_ADDR, and NODE_RANK (0 there)"
    place+=(--main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}")
fi

if grep -q "^pretrained_model_name_or_path:[[:space:]]*[\"']\{0,1\}tiny\b" "$yaml"; then
    "$python" "$recipe/make_tiny.py" --output_dir "$root/outputs/$(basename "$recipe")/tiny_base"
fi
for arg; do   # asks only: one process, whatever the launch file starts
    if [[ ${arg//-/_} =~ ^__(plan|dry_run)$ ]]; then WORLD_SIZE=$world exec "$python" "$recipe/train.py" --config "$yaml" "$@"; fi
done
[[ $gpus -eq 0 || $NPROC -le $gpus ]] || die "NPROC is $NPROC and this machine has $gpus GPUs, expected one process a GPU at most"
# ---- run. Exit codes: 2 a mistake, 74 a full disk, 75 stopped as asked by TERM, HUP, USR1 or Ctrl-C (resume me) ----
if [[ $LAUNCH == single ]]; then exec "$python" "$recipe/train.py" --config "$yaml" "$@"; fi
# a stop must leave time for a step and a save, not 30 seconds
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
RUN_EXIT_CODE_FILE=$(mktemp)   # processes write code and cause: a launcher makes 1 of all, and a traceback
export RUN_EXIT_CODE_FILE
own_group=$(command -v setsid || true)   # Ctrl-C reaches this script alone, which asks once; the second one ends all
$own_group "$python" -m accelerate.commands.launch --config_file "$recipe/accelerate/$LAUNCH.yaml" \
    "${place[@]}" --num_processes "$world" "$recipe/train.py" --config "$yaml" "$@" &
launcher=$!
interrupted=
stop() { kill -TERM "$launcher" 2>/dev/null || true; }
interrupt() { if [[ -n $interrupted ]]; then kill -KILL -- "-$launcher" 2>/dev/null || true; fi; interrupted=1; stop; }
trap stop TERM HUP USR1
trap interrupt INT
code=0
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" && code=0 || code=$?; done
said=$(head -n 1 "$RUN_EXIT_CODE_FILE" 2>/dev/null || true)
tail -n +2 "$RUN_EXIT_CODE_FILE" >&2 2>/dev/null || true   # the cause, last
rm -f "$RUN_EXIT_CODE_FILE"
exit "${said:-$code}"
