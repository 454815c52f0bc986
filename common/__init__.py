"""What every recipe shares: data, flow matching, optimizers, sharding, checkpoints, the run. Model-free on purpose."""
