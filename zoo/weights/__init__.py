"""Authors' checkpoints in, and the zoo's own out."""
