"""Every op in plain PyTorch: for any dtype and device, in bounded memory."""
