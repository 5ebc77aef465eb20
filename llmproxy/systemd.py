"""What systemd is told about the service (`Type=notify`)."""

from __future__ import annotations

import os
import socket

from twisted.logger import Logger

#: Where systemd listens: the address of a socket, set by it.
NOTIFY = "NOTIFY_SOCKET"
#: The process that systemd has started itself.
_STARTED = "SYSTEMD_EXEC_PID"

log = Logger()


def tell_systemd(state: str) -> None:
    """Send `state`, such as `READY=1`, as sd_notify(3) does; nothing happens without systemd."""
    address = os.environ.get(NOTIFY, "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to_systemd:
            to_systemd.setblocking(False)
            to_systemd.sendto(state.encode(), address)
    except OSError as error:
        log.warn("systemd is not told {state}: {error}", state=state, error=error.strerror)


def knows_only_this_process() -> bool:
    """Whether systemd ends the whole service when this process ends, and can't be told better."""
    return os.environ.get(_STARTED) == str(os.getpid()) and NOTIFY not in os.environ
