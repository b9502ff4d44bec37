"""Errors that the user can mend; the command lines print their one line and exit with status 2."""


class BridgeError(Exception):
    """Base of the bridge's errors."""


class CheckpointError(BridgeError):
    """A checkpoint that is missing, half-written or does not fit; the message names the file or the tensors."""


class TransportError(BridgeError):
    """A way of sending weights that this machine does not offer, or that broke; the message says what is missing."""
