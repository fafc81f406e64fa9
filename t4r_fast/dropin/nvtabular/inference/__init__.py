"""`nvtabular.inference`."""
