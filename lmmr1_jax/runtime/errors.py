"""Errors that are the user's to mend: the command line prints their one line and exits with status 2."""


class UserError(Exception):
    """Wrong input; the message is one line that names the file, row or field and says what would be right."""


class SamplingFailed(UserError):
    """Nothing is left to sample with, or a prompt can't be sampled from. A run keeps what it has and can be resumed."""
