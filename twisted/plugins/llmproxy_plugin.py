from twisted.application.service import ServiceMaker

llmproxy = ServiceMaker(
    "llmproxy",
    "llmproxy.service",
    "An HTTP proxy between end users and LLM servers that bills every token.",
    "llmproxy",
)
