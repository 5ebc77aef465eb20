"""llmproxy: the HTTP proxy between end users and LLM servers that bills every token."""

__version__ = "0.1.0"
