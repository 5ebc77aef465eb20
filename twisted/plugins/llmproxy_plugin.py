from twisted.application.reactors import Reactor
from twisted.application.service import ServiceMaker

llmproxy = ServiceMaker(
    "llmproxy",
    "llmproxy.service",
    "An HTTP proxy between end users and LLM servers that bills every token.",
    "llmproxy",
)

reactor = Reactor("llmproxy", "llmproxy.reactor", "epoll, for many small messages.")
