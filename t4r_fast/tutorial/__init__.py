"""The tutorial end to end: sliding windows, the models, two baselines, a report."""
