"""Simulates several hosts with real sshd and Slurm on one machine, and starts runs on them."""
