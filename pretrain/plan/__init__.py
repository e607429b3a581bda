"""A run's memory, time and cost before it is launched: pure functions that import no torch.

`memory` and `time` compute what one option takes, `planner` compares options, `scaling` projects efficiency to many
GPUs, and `report` formats a plan. The package is used as follows:

    plan = make_plan(config, cluster, site)          # ConfigError if nothing fits
    print("\n".join(plan_lines(plan)))
"""
