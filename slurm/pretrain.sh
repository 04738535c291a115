#!/usr/bin/env bash
# Stage 1, alignment: train the projector of a new model. Keys after the name override the recipe:
#   sbatch --nodes=8 slurm/pretrain.sh data.train=/data/pretrain train.num_steps=200
#SBATCH --job-name=tokenflex-pretrain
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

overrides=("$@")
# SLURM runs a copy of this file, so the checkout is looked for from where the job was submitted.
for root in "${TOKENFLEX_ROOT:-}" "${BASH_SOURCE[0]%/*}/.." "${SLURM_SUBMIT_DIR:-$PWD}" "${SLURM_SUBMIT_DIR:-$PWD}/.."; do
  [[ -f $root/slurm/lib.sh ]] && break
done
[[ -f $root/slurm/lib.sh ]] || {
  echo "error: no TokenFLEX checkout at ${SLURM_SUBMIT_DIR:-$PWD}: submit from inside it, or export TOKENFLEX_ROOT=<checkout>" >&2
  exit 2
}
# shellcheck source=slurm/lib.sh
source "$root/slurm/lib.sh"
run_job pretrain train --config "$root/configs/pretrain.yaml" "$@"
