"""The error of files that are not what they should be."""


class WeightsFileError(ValueError):
    """A checkpoint file that is damaged, refused, or of an unknown kind; the message says which and why."""
