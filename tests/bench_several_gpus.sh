#!/usr/bin/env bash
# tests/bench_several_gpus.sh [FOLDER]   the recipes on the GPUs of one machine, random weights of the true size: a table
# GPUS=N        of how many (all that are visible); what needs more is left out, and named
# ONLY=PATTERN  runs whose name matches, for instance ONLY='qwenimage.*|scale_.*'
# TRY=1         the same way through with the tiny models on two processes: whether this script works, no figures
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash setup.sh) || exit
out=$(realpath -m "${1:-outputs/several_gpus}")
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
try=${TRY-}
[[ -z $try ]] || gpus=4
[[ $gpus -gt 0 ]] || { echo "bench_several_gpus.sh: no GPU here; TRY=1 tries the script on a CPU" >&2; exit 2; }
mkdir -p "$out"
steps=20 more=24   # of a run, and of what goes on from its checkpoint
[[ -z $try ]] || steps=3 more=4
failed=0

# NAME  GPUS  LAUNCH  RECIPE  CONFIG  [flags]; writes to $out/NAME
run() {
    local name=$1 count=$2 launch=$3 recipe=$4 config=$5 code
    shift 5
    [[ $name =~ ^(${ONLY:-.*})$ ]] || return 0
    if [[ $count -gt $gpus ]]; then echo "$name: left out, needs $count GPUs, here are $gpus"; return 0; fi
    local flags=(--benchmark --report_to none --validation_steps 0 --checkpointing_steps 0 --max_train_steps $steps)
    if [[ -n $try ]]; then
        config=tiny count=$((count > 2 ? 2 : count))
        flags=(--report_to none --validation_steps 0 --checkpointing_steps 0 --max_train_steps $steps)
    fi
    if [[ $recipe == qwen3vl_qlora ]]; then flags=("${flags[@]/--validation_steps/--validation_epochs}"); fi
    if [[ $count -eq 1 && $launch == ddp ]]; then launch=single; fi
    echo "$name: $count x $launch, $recipe $config $*"
    LAUNCH=$launch NPROC=$count bash "recipes/$recipe/run.sh" "$config" "${flags[@]}" "$@" --output_dir "$out/$name" \
        >"$out/$name.log" 2>&1
    code=$?
    [[ $code == "${EXPECTED:-0}" ]] || { failed=1; echo "$name: exit code $code"; tail -n 5 "$out/$name.log"; return 1; }
}

# ---- 80 GB a card: full runs at 8 samples a step, one of them with a checkpoint that two GPUs go on from ----
cap=(--memory_limit_gib 78)
rm -rf "$out"/qwenimage_full "$out"/stopped
run qwenimage_full 4 fsdp2 qwenimage_fulltune full "${cap[@]}" --checkpointing_steps $steps
run qwenimage_full 2 fsdp2 qwenimage_fulltune full "${cap[@]}" --checkpointing_steps $more --max_train_steps $more \
    --resume_from_checkpoint latest
if [[ -d $out/qwenimage_full/checkpoint-$more ]]; then
    "$python" common/export.py "$out/qwenimage_full/checkpoint-$more" "$out/exported" || failed=1
fi
cap+=(--overwrite_output_dir)
run qwenimage_full_offload 4 zero3_offload qwenimage_fulltune full_offload "${cap[@]}"
run flux2klein_full 4 zero3 flux2klein_fulltune full "${cap[@]}"
run qwenimage_edit_full 4 fsdp2 qwenimage_edit full "${cap[@]}"
run kolors_ddp 3 ddp kolors_spatial_adapter full_ddp "${cap[@]}"
run kolors_zero2 3 zero2 kolors_spatial_adapter full_zero2 "${cap[@]}"
run qwen3vl_ddp 4 ddp qwen3vl_qlora full "${cap[@]}" --num_train_epochs 0

# ---- 24 GB a card: blocks streamed from main memory, which the processes share ----
cap=(--memory_limit_gib 22.5 --overwrite_output_dir)
for recipe in qwenimage_fulltune qwenimage_edit flux2klein_fulltune; do
    run "${recipe}_24gb" "$gpus" ddp "$recipe" full_24gb "${cap[@]}"
done

# ---- scaling: the same work a GPU ----
for count in 1 2 4; do
    run scale_klein_fsdp2_$count $count fsdp2 flux2klein_fulltune bench --overwrite_output_dir \
        --optimizer flash_adamw --gradient_checkpointing
    run scale_kolors_ddp_$count $count ddp kolors_spatial_adapter bench --overwrite_output_dir
    run scale_qwenimage_streamed_$count $count ddp qwenimage_fulltune bench --overwrite_output_dir --stream_blocks -1 \
        --optimizer adafactor --gradient_release --max_grad_norm 0 --ema_decay 0
done

# ---- SIGTERM to the launcher in the middle of a run; the run goes on from the checkpoint that it left ----
if [[ stopped =~ ^(${ONLY:-.*})$ && $gpus -ge 2 ]]; then
    EXPECTED=75 run stopped 2 fsdp2 flux2klein_fulltune full --max_train_steps 1000 &
    until [[ $(wc -l <"$out/stopped/metrics.jsonl") -ge 3 ]] || ! kill -0 $!; do sleep 1; done 2>/dev/null
    pkill -TERM -f "run.sh .*--output_dir $out/stopped"
    wait $! || failed=1
    reached=$(wc -l <"$out/stopped/metrics.jsonl")
    run stopped 2 fsdp2 flux2klein_fulltune full --resume_from_checkpoint latest --max_train_steps $((reached + 3))
fi

# ---- the table: medians after the first quarter of each run's steps ----
"$python" - "$out" <<'P'
import json, statistics, sys
from pathlib import Path

print("\n| run | launch | GPUs | s/step | samples/s | MFU | GiB a GPU | last step |\n|" + "---|" * 8)
for file in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl")):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    about = json.loads((file.parent / "environment.json").read_text())
    median = lambda name: statistics.median(row.get(name) or 0 for row in rows[len(rows) // 4 :])
    cells = [file.parent.name, about["launch"], about["processes"], f"{median('seconds_per_step'):.3f}"]
    cells += [f"{median('samples_per_second'):.2f}", f"{median('mfu'):.3f}"]
    cells += [f"{max(row.get('peak_memory_gib') or 0 for row in rows):.1f}", rows[-1]["step"]]
    print(f"| {' | '.join(map(str, cells))} |")
P
exit $failed
