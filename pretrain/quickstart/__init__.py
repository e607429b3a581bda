"""Parts of `launch/quickstart.sh`: a runner for commands that can be stopped, and the choice of the run's length."""
