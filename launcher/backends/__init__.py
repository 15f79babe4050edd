"""Where a plan runs: this machine, hosts over SSH, SLURM."""
