#!/usr/bin/env bash
# Stage 3, instruction tuning of an exported model:
#   sbatch --nodes=8 slurm/finetune.sh model.init_from=runs/pretrain/model data.train=/data/instruct
#SBATCH --job-name=tokenflex-finetune
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
run_job finetune train --config "$root/configs/finetune.yaml" "$@"
