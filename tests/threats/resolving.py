"""The proxy where names are looked up as slowly, or as oddly, as the test wants.

python resolving.py -c config.toml
"""

from __future__ import annotations

import socket
import time
from typing import Any

SLOW_S = 15.0

_getaddrinfo = socket.getaddrinfo


def getaddrinfo(host: Any, port: Any, *args: Any, **more: Any) -> Any:
    match host:
        case "slow.test":
            time.sleep(SLOW_S)
        case "nowhere.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        case "two.test":  # nobody listens at the first one
            one = (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", port, 0, 0))
            return [one, *_getaddrinfo("127.0.0.1", port, *args, **more)]
    return _getaddrinfo(host, port, *args, **more)


def main() -> None:
    socket.getaddrinfo = getaddrinfo  # before anything has taken it from its module
    from llmproxy.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
