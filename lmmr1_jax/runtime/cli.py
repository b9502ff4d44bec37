"""How a command ends, and how warnings look."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from lmmr1_jax.runtime.errors import UserError
from weights_bridge.errors import BridgeError


def run_cli(main: Callable[[], Any]) -> None:
    """Runs a command and ends the process: what the user can mend is one line on stderr and exit status 2, and so is
    every warning, but for the status."""
    for name in ("lmmr1_jax", "weights_bridge"):
        logging.getLogger(name).addHandler(_Console(logging.WARNING))
        logging.getLogger(name).propagate = False  # whatever other packages have set up
    try:
        status = main()
    except (UserError, BridgeError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status or 0)


class _Console(logging.Handler):
    """A line on stderr, wherever that leads by now: above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)
