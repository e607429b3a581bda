"""Several hosts on one machine with real sshd and Slurm, and runs on them."""
