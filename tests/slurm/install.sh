#!/usr/bin/env bash
# Installs SLURM's and munge's daemons from Debian or Ubuntu packages where they are missing, for the test cluster.
set -euo pipefail

export PATH="$PATH:/usr/sbin:/sbin"
missing=()
for program in slurmctld slurmd munged sbatch srun; do
  command -v "$program" >/dev/null || missing+=("$program")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

packages=(slurmctld slurmd slurm-client munge)
as_root=()
[[ $EUID -eq 0 ]] || as_root=(sudo --non-interactive)
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
  echo "error: the SLURM tests need ${missing[*]}, and this user cannot install them with apt-get: as root, install the packages ${packages[*]} (Debian's names), then run make test-slurm again" >&2
  exit 2
fi
"${as_root[@]}" apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}"
