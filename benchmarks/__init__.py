"""Benchmarks of this program and of others for comparison. The product imports nothing from here."""
