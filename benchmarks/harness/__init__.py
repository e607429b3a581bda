"""What `launch/bench.py` drives: the processes of a measured run, their turns, and the tables made of their results."""
