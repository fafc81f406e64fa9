"""`nvtabular.loader`."""
