"""Parts of `launch/quickstart.sh`: a runner of commands that can be stopped, and a length of the run that keeps its time."""
