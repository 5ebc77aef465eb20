"""`python3 -m llmproxy.ctl` is `llmproxyctl`."""

import sys

from llmproxy.ctl import main

sys.exit(main())
