"""Parts of `launch/quickstart.sh`: a runner of commands that can be stopped, and a run length that keeps its time."""
