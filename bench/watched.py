"""llmproxy with a look inside: `python watched.py OUTPUT ARGS...`, for `run.py --soak`.

At each SIGUSR2 it writes OUTPUT: how many blocks of memory Python has given out, and how many
objects its garbage collector knows, as JSON. Nothing is collected for it.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import threading
from pathlib import Path


def watch(output: Path) -> None:
    """Wait for signals, in a thread of its own: so it does not matter what the reactor does."""
    while True:
        signal.sigwait({signal.SIGUSR2})
        found = {"blocks": sys.getallocatedblocks(), "objects": len(gc.get_objects())}
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(output)


def main() -> None:
    """Run llmproxy."""
    # Before there is any thread: they all inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    output = Path(sys.argv.pop(1))
    threading.Thread(target=watch, args=(output,), daemon=True).start()
    from llmproxy.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
