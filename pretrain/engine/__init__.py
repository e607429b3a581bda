"""One optimizer step under DeepSpeed, and all state as whole, named tensors. Nothing else imports DeepSpeed.

The loop uses it so:

    engine = Engine(config, world)
    result = engine.train_step(batches, step, lr=3e-4)
    engine.state.snapshot()                          # weights and moments, as a checkpoint holds them
"""
