#!/bin/bash
# sbatch --array=0-7 integrations/slurm/capture_array.sh integrations/capture/verified.yaml
# Tasks share the directory that the YAML names, without a coordinator. A task that is killed costs its unit; submit the
# same array again, with any number of tasks, and it goes on. Each task ends when everything is done.
#SBATCH --job-name=capture
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
srun kd-plugin capture --config "$@"
