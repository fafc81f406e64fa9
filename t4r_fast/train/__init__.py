"""Training: loaders, Trainer and optimizers; and the training commands, which run the tutorial's
models over sliding windows, beside two baselines, and write a report."""
