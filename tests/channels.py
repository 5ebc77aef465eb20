"""Which HTTP channel the tests run on: ours, or Twisted's for comparison (`LLMPROXY_HTTP`)."""

from __future__ import annotations

import os

import pytest

from llmproxy.site import VARIABLE

#: For what our own channel does, and Twisted's does not.
only_ours = pytest.mark.skipif(
    os.environ.get(VARIABLE) == "twisted", reason="Twisted's channel does not do this"
)
