"""A run's memory, time, cost and loss before it is launched: pure functions that import no torch.

`memory` and `time` compute what one option takes, `planner` compares options, `scaling` projects efficiency to many
GPUs, `recipes` plans those of conf/experiment/, and `report` formats a plan. `loss` has published laws of the loss,
`ladder` what small runs of one's own say of a larger one, and `ladder_fit`, which needs scipy, fits their law. The
package is used as follows:

    plan = make_plan(config, cluster, site)          # ConfigError if nothing fits
    print("\n".join(plan_lines(plan)))
"""
