"""Everything that knows SLURM. Never imports torch."""
