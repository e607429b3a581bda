"""The training loop.

`run` assembles the parts of a run, `loop` takes one step after another, and `run_folder` decides whether a
configuration may continue a run. `loss_guard` watches the loss of the steps, and `stragglers` watches their duration.
The package is used as follows:

    inputs = resolve_inputs(config, launched_world_size())      # reads the manifests; needs no torch
    world = init_world(config.engine.timeout_s)
    code = train(inputs, world, watchdog, clean)                # an ExitCode: finished, or stopped with the state saved
"""
