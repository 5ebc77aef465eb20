"""A proxy in a process of its own whose keys and bills are in a real MongoDB, and who asks it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mongod
from load import Asked, Load, Plan
from rig import Rig

CLIENTS = 12
STRANGERS = 200  # keys that are right, and that the proxy has not seen yet
PASSWORD = "for-a-test"


class MongoRig(Rig):
    """A proxy whose keys and bills are in a MongoDB, with its journal in its folder."""

    def __init__(
        self, folder: Path, client: mongod.Client, address: str, *, workers: int = 1
    ) -> None:
        self._client = client
        self._uri = f"mongodb://llmproxy:{PASSWORD}@{address}/?authSource=cgc"
        keys = CLIENTS + STRANGERS
        super().__init__(folder, clients=keys, command=["-m", "llmproxy"], workers=workers)
        self.database = folder / "ledger.sqlite"

    def _add_keys(self, clients: int) -> None:
        client = self._client
        find = {"resource": {"db": "cgc", "collection": "api_keys"}, "actions": ["find"]}
        add = {"resource": {"db": "billing", "collection": "events_oneoff"}, "actions": ["insert"]}
        actions = ["find", "insert", "update"]
        put = {"resource": {"db": "llmproxy", "collection": "limits"}, "actions": actions}
        roles = [
            ("cgc", "apiKeysReader", find),
            ("billing", "completionBillingWriter", add),
            ("llmproxy", "limitsWriter", put),
        ]
        with contextlib.suppress(mongod.pymongo.errors.OperationFailure):  # made by another test
            for database, role, may in roles:
                client[database].command("createRole", role, privileges=[may], roles=[])
            named = [{"role": role, "db": database} for database, role, _ in roles]
            client.cgc.command("createUser", "llmproxy", pwd=PASSWORD, roles=named)
        client.cgc.api_keys.drop()
        client.billing.events_oneoff.drop()
        client.llmproxy.limits.drop()
        client.cgc.api_keys.insert_many(
            {
                "_id": str(n),
                "secret": hashlib.sha256(Load.key(n).encode()).hexdigest(),
                "access_level": "LLM",
                "user_id": f"user-{n}",
                "date_expiry": None,
            }
            for n in range(clients)
        )

    def configuration(self, *urls: str, **options: Any) -> str:
        text = super().configuration(*urls, **options)
        old = f'uri = "sqlite://{self.database}"\n'
        assert old in text
        return text.replace(old, f'uri = "{self._uri}"\n[ledger]\npath = "{self.database.name}"\n')

    def undelivered(self) -> int:
        """How many bills wait in the journal."""
        statement = (
            "SELECT count(*) FROM ledger WHERE state IN ('settled', 'estimated') AND delivered = 0"
        )
        return int(self.query(statement)[0][0])

    def bills(self) -> dict[str, Counter[tuple[str, int]]]:
        """What is in MongoDB, by request."""
        bills: dict[str, Counter[tuple[str, int]]] = {}
        for event in self._client.billing.events_oneoff.find():
            kind = event["product"].rpartition("/")[2]
            bills.setdefault(event["request_id"], Counter())[kind, event["quantity"]] += 1
        return bills

    def owners_agree(self) -> bool:
        """Each bill names its key's user."""
        events = self._client.billing.events_oneoff.find()
        return all(event["user_id"] == f"user-{event['api_key_id']}" for event in events)


@dataclass(frozen=True)
class Stranger:
    """A request with a key that was never used, the header of its answer, and how long it took."""

    asked: Asked
    head: str
    took_s: float

    @property
    def may_come_again(self) -> bool:
        """It is told when."""
        return "retry-after: " in self.head.lower()


async def ask_once(port: int, number: int) -> Stranger:
    """One short request with the key of this number, on a connection of its own."""
    one = Load(port, number, Plan(random.Random(number), max_tokens=2, max_ms=5))
    one.generation = port  # no other load's, so that the markers differ
    link, out = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    heads: list[bytes] = []
    read = link.readuntil

    async def note(separator: bytes = b"\n") -> bytes:
        heads.append(await read(separator))
        return heads[-1]

    link.readuntil = note  # type: ignore[assignment]
    try:
        await one._ask(number, link, out)
    finally:
        out.transport.abort()
    return Stranger(one.asked[0], heads[0].decode("latin-1"), time.monotonic() - began)
