#!/bin/bash
# Samples of many prompts on two nodes of eight GPUs: each node holds one network (--tp 8), the two replicas take prompts
# from one queue. If a process dies, torchrun starts all again, up to three times, and the job goes on from its output,
# which both nodes must see. From the repository's folder: sbatch examples/slurm.sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$head:29500" --rdzv_id="$SLURM_JOB_ID" \
    generate.py --checkpoint_path LARGE --prompts prompts.jsonl -n 64 --seed 1 \
    --output samples.jsonl --resume --report report.json
