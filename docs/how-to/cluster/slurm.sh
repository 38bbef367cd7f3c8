#!/bin/bash
# A Ray cluster for as long as a job of SLURM runs: sbatch slurm.sh
# A job that ends at its limit is started again by the same command, and goes on.
#SBATCH --job-name=captum-cage
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00

set -euo pipefail

# A virtual environment that all nodes see, with captum-cage[scale] in it.
source "$HOME/captum-cage/bin/activate"

# Nodes trust each other by a token in the home folder, which they share.
ray get-auth-token --generate > /dev/null

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | cut -d " " -f 1)

# Two workers share a GPU: 2 nodes, 4 GPUs each, 16 workers.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus 4 -- \
  python -u run.py examples.jsonl explained \
  --model Qwen/Qwen3-8B --workers 16 --gpus 0.5 --cpus 4
