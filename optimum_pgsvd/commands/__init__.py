"""`optimum-cli pgsvd ...`; heavy imports stay inside each command."""
