"""What `make bench` runs: our code beside the published code's, in one process on one machine."""
