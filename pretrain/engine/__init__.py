"""One optimizer step under DeepSpeed, and all state as whole, named tensors. Nothing else imports DeepSpeed.

The training loop uses it as follows:

    engine = Engine(config, world)
    result = engine.train_step(batches, step, lr=3e-4)
    engine.state.snapshot()                          # weights and moments, as stored in a checkpoint
"""
