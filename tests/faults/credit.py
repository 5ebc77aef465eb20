"""A crowd that streams with one key at once, from several proxies, until its credit is used up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from speech import CHAT

from llmproxy.budgets import LEASE

TOKEN = CHAT.token(None)
OUT = b'"code":"insufficient_quota"'
#: What can be on its way at most when a budget is used up, in tokens of a stream: a piece of TCP.
ON_THE_WAY = 64


@dataclass
class Streamed:
    """What one request came to. `tokens`: of its answer, that its client has got."""

    prompt: int
    status: int = 0
    tokens: int = 0
    ended: bool = False
    #: How many tokens the whole crowd had when it was refused or cut.
    seen: int = 0
    raw: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def out_of_credit(self) -> bool:
        return OUT in self.raw


class Crowd:
    """Requests with one key, spread over some ports. Each answer has `tokens`, one in `ms`."""

    def __init__(
        self, ports: Sequence[int], key: str, *, prompt: int = 5, tokens: int = 700, ms: int = 1
    ) -> None:
        self.all: list[Streamed] = []
        self._ports = itertools.cycle(ports)
        self._key, self._prompt, self._tokens, self._ms = key, prompt, tokens, ms

    @property
    def used(self) -> int:
        """What all have had, as far as clients can know."""
        return sum(each.tokens + each.prompt * each.ended for each in self.all)

    async def stream(self, count: int) -> list[Streamed]:
        """So many requests at once."""
        return list(await asyncio.gather(*(self.ask() for _ in range(count))))

    async def ask(self) -> Streamed:
        """One request, up to the end of its connection."""
        mine = Streamed(self._prompt)
        self.all.append(mine)
        text = f"credit-{len(self.all)} {self._prompt} {self._tokens} {self._ms}"
        body = CHAT.request("m", text, stream=True)
        link, out = await asyncio.open_connection("127.0.0.1", next(self._ports))
        out.write(
            (
                f"POST {CHAT.path} HTTP/1.1\r\nHost: p\r\nAuthorization: Bearer {self._key}\r\n"
                "Connection: close\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            ).encode()
            + body
        )
        while data := await link.read(65536):
            mine.raw += data
            mine.tokens = mine.raw.count(TOKEN)
            if mine.out_of_credit and not mine.seen:
                mine.seen = self.used
        mine.status = int(mine.raw[9:12])
        mine.ended = b"data: [DONE]" in mine.raw
        out.close()
        return mine

    def check(self, credit: int, billed: int) -> None:
        """Everybody got what they should, and `billed` is right for it."""
        streams = [each for each in self.all if each.status == 200]
        cut = [each for each in streams if not each.ended]
        assert cut, "the credit was enough for all"
        for each in cut:
            assert each.out_of_credit, bytes(each.raw[-300:])
            assert not each.raw.endswith(b"0\r\n\r\n"), "looks whole"
        refused = [each for each in self.all if each.status != 200]
        assert {each.status for each in refused} <= {402}
        on_the_way = ON_THE_WAY * len(streams)
        for each in [*cut, *refused]:
            assert each.seen >= credit - on_the_way, "out of credit while there was some"
        assert billed == self.used
        assert credit <= billed <= credit + len(streams) * (LEASE + ON_THE_WAY + self._prompt)
