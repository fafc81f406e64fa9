"""Triton kernels, one file per op; installed as `t4r_fast.kernels`."""
