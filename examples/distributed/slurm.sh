#!/usr/bin/env bash
# Two nodes with 8 GPUs each under Slurm. Usage, in the folder of the repository:
# sbatch examples/distributed/slurm.sh MODEL TEXTS.txt OUT [--steps N ...]
# MODEL, TEXTS and OUT must lie where all nodes see them. Killed or requeued, it goes on from the last checkpoint.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4 TOKENIZERS_PARALLELISM=false
# Slurm copies this script away: the example is found from where it was submitted.
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d \
  --rdzv_endpoint "$head:29500" "$SLURM_SUBMIT_DIR/examples/distributed/distill.py" "$@"
