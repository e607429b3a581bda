"""Fuzzes every parser of untrusted input. The script is run.py."""
