"""Keeps a run alive, and records how it ended. Imports no torch.

A watcher beside each rank notices when the rank dies, hangs or loses its host (`watchdog`, `watcher`, `hub`,
`heartbeat`, `processes`). A request to stop reaches the trainer through `stop`. `events` names what can happen to a
run and writes it down; it is a file of JSON lines (`json_lines`), as are the metrics, and `journal` reads the true
history back from them. `supervisor` starts the run again and judges each attempt (`attempts`).
"""
