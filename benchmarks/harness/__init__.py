"""The harness behind `launch/bench.py`: it runs the measured processes in turns, and makes tables of their results."""
