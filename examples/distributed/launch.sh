#!/usr/bin/env bash
# One machine, 8 GPUs. Usage: launch.sh torchrun|ddp|fsdp MODEL TEXTS.txt OUT [--steps N ...]
set -euo pipefail
way=$1; shift
script="$(dirname "$0")/distill.py"
case $way in
  # Each process has the whole student; gradients are averaged.
  torchrun) exec torchrun --nproc_per_node 8 "$script" "$@" ;;
  ddp)      exec accelerate launch --multi_gpu --num_processes 8 "$script" "$@" ;;
  # Each process has a part of the student and of its optimizer's state (FSDP2).
  fsdp)     exec accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
              --fsdp_reshard_after_forward true --num_processes 8 "$script" "$@" ;;
  *)        echo "the way must be torchrun, ddp or fsdp, got $way" >&2; exit 2 ;;
esac
