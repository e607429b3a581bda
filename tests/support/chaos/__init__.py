"""Runs that are disturbed at random moments, and the oracle that checks what is left of them: run.py."""
