"""What an ending says about the server, and whether another server may be asked instead. Pure."""

from __future__ import annotations

from llmproxy.errors import BackendError
from llmproxy.forward import Ending
from llmproxy.model import Outcome
from llmproxy.upstream import NotSent

# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_COMPLETE = Outcome.COMPLETE
_FAILURES = (Outcome.BACKEND_FAILED, Outcome.TRUNCATED, Outcome.STALLED)


def went_well(ending: Ending) -> bool | None:
    """Whether the server did its part; None: that can't be said.

    What is the client's own fault is none of the server's, and an error within an answer may be
    either's. Being busy (429) is no fault.
    """
    if ending.outcome is _COMPLETE:
        return True
    if isinstance(ending.last, BackendError):
        return False if ending.outcome in _FAILURES or ending.outcome is Outcome.REFUSED else None
    if ending.outcome is Outcome.REFUSED and ending.status is not None and ending.status != 429:
        return True
    return None


def may_be_repeated(ending: Ending, *, begun_too: bool) -> bool:
    """Whether the request may go to another server, as long as the client has got nothing.

    `begun_too`: even if this one may have begun to work on it, whose work nobody pays for then.
    """
    if isinstance(ending.last, NotSent):
        return True
    return begun_too and isinstance(ending.last, BackendError) and went_well(ending) is False
