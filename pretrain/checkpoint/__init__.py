"""A checkpoint is complete or does not exist, and it loads on any number of ranks.

`folder` and `state` say what lies in a checkpoint's folder and import no torch. `tensors` saves, verifies, finds and
loads it. `saver` saves beside training and deletes what the policy does not keep.
"""
