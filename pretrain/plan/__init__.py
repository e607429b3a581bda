"""A run's memory, time and cost before it is launched: pure functions that import no torch.

`memory` and `time` compute one layout, `planner` compares layouts, `scaling` projects efficiency, `report` prints.
"""
