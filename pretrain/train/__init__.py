"""The training loop.

`run` assembles everything that a run consists of, `loop` takes one step after another, and `run_folder` decides whether
a configuration may continue a run. `loss_guard` watches the loss of the steps, `stragglers` their time. It is used so:

    inputs = resolve_inputs(config, launched_world_size())      # reads the manifests; needs no torch
    world = init_world(config.engine.timeout_s)
    code = train(inputs, world, watchdog)                       # an ExitCode: finished, or stopped with the state saved
"""
