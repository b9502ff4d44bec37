"""Errors that the user can mend; the command lines print their one line and exit with status 2."""


class CheckpointError(Exception):
    """A checkpoint that is missing, half-written or does not fit; the message names the file or the tensors."""
