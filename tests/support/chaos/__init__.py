"""Disturbs runs at random moments and checks the result with an oracle. The script is run.py."""
