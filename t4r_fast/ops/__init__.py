"""The public ops, one file each; `t4r_fast` re-exports them flat."""
