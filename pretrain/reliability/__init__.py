"""Keeps a run alive, and records how it ended. Imports no torch.

A watcher beside each rank notices when the rank dies, hangs or loses its host (`watchdog`, `watcher`, `hub`,
`heartbeat`). A request to stop reaches the trainer through `stop`. Files of JSON lines (`journal`) record what
happened, and `supervisor` starts the run again and judges each attempt (`attempts`).
"""
