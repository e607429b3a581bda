"""A checkpoint is complete or does not exist, and it loads on any number of ranks.

`folder` and `state` define the content of a checkpoint's folder and import no torch. `tensors` saves, verifies, finds
and loads checkpoints. `saver` saves them while training continues, and deletes those that the policy does not keep.
"""
