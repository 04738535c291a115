# shellcheck shell=bash
# The one file to edit: cp slurm/site.example.sh slurm/site.sh, then fill in what your cluster needs.
# The job scripts source it, both where you submit and in the job (`module load ...` lines may stand here too).

# Where jobs run. Names are sbatch's own (man sbatch, INPUT ENVIRONMENT VARIABLES); what you give sbatch by hand wins.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100

# What a node has: one rank is started per GPU. 0 GPUs trains on CPUs with TOKENFLEX_RANKS_PER_NODE ranks (gloo).
export TOKENFLEX_GPUS_PER_NODE=8
# export TOKENFLEX_RANKS_PER_NODE=8

# Software: a virtual environment (default: .venv in the checkout), or a container image that holds it.
# An image ending in .sif is run by apptainer, any other by srun's --container-image (pyxis).
# export TOKENFLEX_VENV=/shared/venvs/tokenflex
# export TOKENFLEX_CONTAINER=/shared/images/tokenflex.sqsh
# export TOKENFLEX_CONTAINER_MOUNTS=/shared,/scratch

# Network interface that ranks meet on, as `ip -br addr` names it (empty: the one that has the default route).
# export TOKENFLEX_NETWORK_INTERFACE=ib0

# Folders that every node must be able to write to, checked before ranks start; separated by colons.
# export TOKENFLEX_WRITABLE=/scratch/me

# A job that is started this often in a row without a newer checkpoint is not requeued again.
# export TOKENFLEX_MAX_STARTS_WITHOUT_PROGRESS=3

# MPI flavour of `srun --mpi` that indexing uses (`srun --mpi=list` shows what there is).
# export TOKENFLEX_MPI=pmi2
