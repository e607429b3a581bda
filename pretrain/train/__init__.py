"""The training loop.

`run` puts everything together that a run consists of, `loop` takes one step after another, `run_folder` says whether a
configuration may go on with a run, and `loss_guard` and `stragglers` judge the steps.
"""
