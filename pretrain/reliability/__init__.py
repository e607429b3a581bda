"""Keeps a run alive, and records how it ended. Imports no torch.

A watcher process beside each rank notices when the rank dies, hangs or loses its host (`watchdog`, `watcher`, `hub`,
`heartbeat`, `processes`). A request to stop reaches the trainer through `stop`. `events` names the events of a run
and appends them to a file of JSON lines (`json_lines`). The metrics are such a file too, and `journal` reconstructs
the run's true history from both. `supervisor` starts the training command again until the run has finished, and
records what each start achieved (`starts`).
"""
