"""Jobs under SLURM: what runs in the batch script around the ranks. Standard library only, as it may run outside of the
container or environment that the ranks run in."""
