"""One optimizer step: noise and target, seeds, learning rate, clipping, optimizers."""
