"""Every op in plain PyTorch: the truth that each kernel is tested against."""
