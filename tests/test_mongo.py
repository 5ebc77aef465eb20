"""The MongoDB stores against a real mongod: queries, documents, users, TLS, faults."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import ipaddress
import json
import math
import re
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bson
import mongod
import pymongo.errors
import pytest
import pytest_twisted
from bson import Int64, ObjectId
from bson.binary import Binary, UuidRepresentation
from bson.datetime_ms import DatetimeMS
from bson.decimal128 import Decimal128
from bson.raw_bson import RawBSONDocument
from bson.timestamp import Timestamp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mongod import Mongod, ReplicaSet, TLSFiles
from ports import free_port
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from zope.interface import implementer
from zope.interface.verify import verifyObject

from llmproxy.delivery import Delivery
from llmproxy.errors import ConfigError, StorageError
from llmproxy.model import BUDGETS, Account, Amount, Event, OwnLimits, Spending
from llmproxy.storage import IAccounts, IEventSink, IOutbox
from llmproxy.storage.mongo import (
    MongoStore,
    bson_value,
    connect,
    event_document,
    event_id,
    raise_unless_stored,
    text_value,
)
from llmproxy.storage.mongo_pool import MAX_WAITING, POOL_SIZE

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
HASH = "5d6b091416885eaa91283321b69dc526fc42c97783e4cdfdff7a945e3be1f9ef"
PASSWORD = "canary-password"
SPENT = Spending(NOW.date(), Amount(1, 2), Amount(3, 4), Amount(5, 6), Amount(7, 8), 9)

ROLES = [
    {"role": "apiKeysReader", "db": "cgc"},
    {"role": "completionBillingWriter", "db": "billing"},
    {"role": "limitsWriter", "db": "llmproxy"},
]

# Survives a kill of a server that stands alone.
DURABLE = {"w": 1, "j": True}

Document = dict[str, Any]


def event(number: int = 1, kind: str = "prompt", **changes: Any) -> Event:
    return Event(
        **{
            "rid": f"request-{number}",
            "created": NOW,
            "account": Account("key-1", "user-1"),
            "product": f"org/model/gpu/{kind}",
            "quantity": number,
            **changes,
        }
    )


def bill(count: int) -> list[Event]:
    """The events of `count` requests, two each."""
    return [event(n, kind) for n in range(count) for kind in ("prompt", "completion")]


def create_roles(client: mongod.Client) -> None:
    find = {"resource": {"db": "cgc", "collection": "api_keys"}, "actions": ["find"]}
    client.cgc.command("createRole", "apiKeysReader", privileges=[find], roles=[])
    insert = {"resource": {"db": "billing", "collection": "events_oneoff"}, "actions": ["insert"]}
    client.billing.command("createRole", "completionBillingWriter", privileges=[insert], roles=[])
    actions = ["find", "insert", "update"]
    share = {"resource": {"db": "llmproxy", "collection": "limits"}, "actions": actions}
    with contextlib.suppress(pymongo.errors.OperationFailure):  # made by other tests of limits
        client.llmproxy.command("createRole", "limitsWriter", privileges=[share], roles=[])


def create_user(client: mongod.Client, name: str, password: str = PASSWORD, **options: Any) -> None:
    options = {"roles": ROLES, "writeConcern": DURABLE, **options}
    database = client[options.pop("database", "cgc")]
    database.command("createUser", name, pwd=password, **options)


@pytest.fixture(scope="session")
def shared() -> Mongod:
    """The server of all tests here, with the roles and the user `llmproxy`."""
    server = mongod.standalone()
    create_roles(server.client())
    create_user(server.client(), "llmproxy")
    return server


@pytest.fixture
def server(shared: Mongod) -> Iterator[Mongod]:
    """The shared server, without documents and without faults."""
    client = shared.client()
    for collection in (client.cgc.api_keys, client.billing.events_oneoff):
        collection.drop()
    yield shared
    shared.ensure_running()
    shared.fail_command("off")


def uri(server: Mongod, user: str = "llmproxy", password: str = PASSWORD, more: str = "") -> str:
    return f"mongodb://{user}:{password}@{server.address}/?authSource=cgc{more}"


@contextlib.asynccontextmanager
async def opened(uri: str, timeout_s: float = 5.0) -> AsyncIterator[MongoStore]:
    store = connect(uri, reactor)
    await store.start(timeout_s)
    try:
        yield store
    finally:
        await store.close()


async def refusal(uri: str, timeout_s: float = 5.0) -> Exception:
    """The error of a start that must fail."""
    try:
        async with opened(uri, timeout_s):
            pass
    except (ConfigError, StorageError) as error:
        return error
    raise AssertionError("the start did not fail")


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await deferLater(reactor, 0.02)


def stored(server: Mongod | ReplicaSet) -> list[tuple[str, str]]:
    """(request, product) of what is on the bill; sorted, so that a double shows."""
    documents = server.client().billing.events_oneoff.find()
    return sorted((document["request_id"], document["product"]) for document in documents)


def expected(events: Sequence[Event]) -> list[tuple[str, str]]:
    return sorted((event.rid, event.product) for event in events)


# Keys


def test_the_stores_are_what_the_interfaces_say() -> None:
    store = connect("mongodb://h", reactor)
    assert verifyObject(IAccounts, store.accounts)
    assert verifyObject(IEventSink, store.events)


@pytest_twisted.ensureDeferred
async def test_a_key_is_asked_for_by_exactly_this_query(server: Mongod) -> None:
    client = server.client()
    client.cgc.command("profile", 2)
    try:
        async with opened(uri(server)) as store:
            await store.accounts.find(HASH, NOW)
    finally:
        client.cgc.command("profile", 0)
    query = {"op": "query", "command.filter.secret": HASH}
    (asked,) = client.cgc["system.profile"].find(query)
    assert asked["ns"] == "cgc.api_keys"
    assert asked["command"]["filter"] == {
        "access_level": "LLM",
        "secret": HASH,
        "$or": [
            {"date_expiry": {"$gt": NOW.replace(tzinfo=None)}},
            {"date_expiry": None},
        ],
    }


@pytest.mark.parametrize(
    ("document", "valid"),
    [
        ({"date_expiry": None}, True),
        ({}, True),
        ({"date_expiry": NOW + timedelta(milliseconds=1)}, True),
        ({"date_expiry": NOW}, False),
        ({"date_expiry": NOW - timedelta(days=1)}, False),
        ({"date_expiry": "2124-01-01"}, False),
        ({"date_expiry": 4_102_444_800_000}, False),
        ({"date_expiry": Timestamp(4_102_444_800, 1)}, False),
        ({"date_expiry": [NOW + timedelta(days=1), NOW - timedelta(days=1)]}, False),
        ({"date_expiry": [None]}, False),
        ({"date_expiry": {}}, False),
        ({"date_expiry": None, "access_level": "ADMIN"}, False),
        ({"date_expiry": None, "access_level": None}, False),
        ({"date_expiry": None, "secret": HASH.upper()}, False),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_key_is_valid_by_level_hash_and_date(server, document, valid) -> None:
    full = {"_id": "key-1", "user_id": "u", "access_level": "LLM", "secret": HASH, **document}
    server.client().cgc.api_keys.insert_one(full)
    async with opened(uri(server)) as store:
        found = await store.accounts.find(HASH, NOW)
    assert found == (Account("key-1", "u", document.get("date_expiry")) if valid else None)


@pytest.mark.parametrize(
    ("models", "allowed"),
    [
        (None, None),
        (["a", "b"], {"a", "b"}),
        ([], set()),
        (["a", 7], {"a"}),
        ("a", set()),
        (7, set()),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_key_may_be_limited_to_models(server: Mongod, models: object, allowed: Any) -> None:
    key = {"_id": "key-1", "access_level": "LLM", "secret": HASH, "models": models}
    server.client().cgc.api_keys.insert_one(key)
    async with opened(uri(server)) as store:
        found = await store.accounts.find(HASH, NOW)
    assert found is not None
    assert found.models == allowed


@pytest.mark.parametrize(
    ("limits", "own"),
    [
        (None, None),
        ({}, OwnLimits()),
        ({"requests_per_minute": 60}, OwnLimits(60, None)),
        ({"requests_per_minute": 60.0, "concurrent_requests": Int64(0)}, OwnLimits(60, 0)),
        ({"requests_per_minute": None, "concurrent_requests": 1_000_000}, OwnLimits(None, 10**6)),
        ({"tokens_per_minute": 10**9}, OwnLimits(tokens_per_minute=10**9)),
        (
            {"tokens_total": 0, "cost_total": 9e15, "cost_per_day": Int64(2**40)},
            OwnLimits(tokens_total=0, cost_total=9 * 10**15, cost_per_day=2**40),
        ),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_key_may_have_limits_of_its_own(
    server: Mongod, limits: object, own: OwnLimits | None
) -> None:
    key = {"_id": "key-1", "access_level": "LLM", "secret": HASH, "limits": limits}
    server.client().cgc.api_keys.insert_one(key)
    async with opened(uri(server)) as store:
        found = await store.accounts.find(HASH, NOW)
    assert found == Account("key-1", limits=own)


@pytest_twisted.ensureDeferred
async def test_credit_is_added_in_place(server: Mongod) -> None:
    keys = server.client().cgc.api_keys
    keys.insert_one({"_id": "key-1", "access_level": "LLM", "secret": HASH})
    async with opened(uri(server)) as store:
        for total in (10_000_000, 20_000_000):
            keys.update_one({"secret": HASH}, {"$inc": {"limits.cost_total": 10_000_000}})
            found = await store.accounts.find(HASH, NOW)
            assert found == Account("key-1", limits=OwnLimits(cost_total=total))
        keys.update_one({"secret": HASH}, {"$inc": {"limits.cost_total": -20_000_001}})
        assert await store.accounts.find(HASH, NOW) is None


NO_LIMIT: list[Any] = ["60", -1, 1.5, True, 10**6 + 1, math.nan, [1], math.inf, {}, ""]
NO_LIMITS: list[Any] = [
    *(60, "60", [], [60], True, {"request_per_minute": 60}),
    *[{"requests_per_minute": each} for each in NO_LIMIT],
    *[{name: each} for name in BUDGETS for each in (-1, 0.5, "1", True, 9e15 + 2, 2**53)],
]


@pytest_twisted.ensureDeferred
async def test_a_key_whose_limits_are_none_is_refused(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        for number, limits in enumerate(NO_LIMITS):
            key = {"_id": number, "access_level": "LLM", "secret": f"{number}", "limits": limits}
            server.client().cgc.api_keys.insert_one(key)
            assert await store.accounts.find(f"{number}", NOW) is None, limits


@pytest_twisted.ensureDeferred
async def test_a_key_that_ends_when_python_has_no_dates_any_more_is_valid(server: Mongod) -> None:
    full = {"_id": "key-1", "access_level": "LLM", "secret": HASH, "date_expiry": DatetimeMS(2**60)}
    server.client().cgc.api_keys.insert_one(full)
    async with opened(uri(server)) as store:
        assert await store.accounts.find(HASH, NOW) == Account("key-1")


USER_IDS = [
    "user",
    "",
    "ejson:{}",
    '{"$oid": "x"}',
    None,
    True,
    7,
    Int64(7),
    2**40,
    1.5,
    ObjectId("65f0c0ffee65f0c0ffee65f0"),
    Binary.from_uuid(uuid.UUID(int=5), UuidRepresentation.STANDARD),
    Binary(b"\x00raw"),
    Decimal128("1.50"),
    datetime(2020, 1, 1, 2, 3, 4, 5000, tzinfo=UTC),
    {"tenant": ObjectId("65f0c0ffee65f0c0ffee65f0"), "n": [Int64(1), None]},
]


@pytest.mark.parametrize("user_id", USER_IDS, ids=repr)
def test_a_user_id_survives_as_text(user_id: object) -> None:
    text = text_value(user_id)
    assert text is None or isinstance(text, str)
    assert bson.encode({"user_id": bson_value(text)}) == bson.encode({"user_id": user_id})


def test_text_that_only_looks_tagged_stays_text() -> None:
    assert bson_value("ejson:no json") == "ejson:no json"


@pytest_twisted.ensureDeferred
async def test_the_bill_has_the_key_s_user_id_byte_for_byte(server: Mongod) -> None:
    client = server.client()
    raw: Any = client.get_database("cgc").with_options(
        codec_options=client.codec_options.with_options(document_class=RawBSONDocument)
    )
    async with opened(uri(server)) as store:
        for number, user_id in enumerate(USER_IDS):
            secret = f"{number:064x}"
            key = {"access_level": "LLM", "secret": secret, "user_id": user_id}
            client.cgc.api_keys.insert_one(key)
            account = await store.accounts.find(secret, NOW)
            assert account is not None
            assert account.key_id == str(key["_id"])
            await store.events.deliver([event(number, account=account)])
    project: list[Document] = [{"$project": {"_id": 0, "user_id": 1}}]
    keys = raw.api_keys.aggregate([{"$sort": {"secret": 1}}, *project])
    bills = raw.client.billing.with_options(
        codec_options=raw.codec_options
    ).events_oneoff.aggregate([{"$sort": {"quantity": 1}}, *project])
    assert [key.raw for key in keys] == [line.raw for line in bills]


# The bill


@pytest_twisted.ensureDeferred
async def test_an_event_becomes_exactly_this_document(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        await store.events.deliver([event(quantity=2**63 - 1)])
    (document,) = server.client().billing.events_oneoff.find()
    assert document == {
        # 695735a5 is 2026-01-02T03:04:05Z; SHA-256("request-1/prompt") begins as the rest.
        "_id": ObjectId("695735a5" + "7282d7cfc5b5dbf0"),
        "date_created": datetime(2026, 1, 2, 3, 4, 5, 678_000),
        "user_id": "user-1",
        "api_key_id": "key-1",
        "product": "org/model/gpu/prompt",
        "quantity": 2**63 - 1,
        "request_id": "request-1",
    }


def test_ids_differ_by_request_type_and_second() -> None:
    changed = [
        event(),
        event(kind="completion"),
        event(rid="request-2"),
        event(created=NOW + timedelta(seconds=1)),
    ]
    assert len({event_id(e) for e in changed}) == 4
    assert event_id(event(quantity=5, created=NOW + timedelta(milliseconds=1))) == event_id(event())


@pytest_twisted.ensureDeferred
async def test_delivering_again_is_success_and_changes_nothing(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        await store.events.deliver(bill(3))
        await store.events.deliver(bill(5))
        await store.events.deliver(bill(5))
        await store.events.deliver([])
    assert stored(server) == expected(bill(5))


@pytest_twisted.ensureDeferred
async def test_a_duplicate_of_something_else_is_no_success(server: Mongod) -> None:
    bills = server.client().billing.events_oneoff
    bills.create_index("quantity", unique=True)
    async with opened(uri(server)) as store:
        await store.events.deliver([event(1)])
        with pytest.raises(StorageError, match="error 11000"):
            await store.events.deliver([event(2, quantity=1), event(3)])
    # The others of a batch don't wait for the one that is refused.
    assert stored(server) == expected([event(1), event(3)])


@pytest.mark.parametrize(
    "reply",
    [
        {"ok": 0, "code": 13},
        {},
        {"ok": 1, "writeConcernError": {"code": 64}},
        {"ok": 1, "writeErrors": [{"code": 11000}, {"code": 121}]},
        {"ok": 1, "writeErrors": [{"code": 11000}], "writeConcernError": {"code": 64}},
    ],
)
def test_only_a_full_success_counts(reply: Document) -> None:
    with pytest.raises(StorageError):
        raise_unless_stored(reply)


# Users, roles, mechanisms


@pytest_twisted.ensureDeferred
async def test_the_user_of_the_docs_can_do_its_work_and_nothing_else(server: Mongod) -> None:
    admin = server.client()
    create_user(admin, "least")
    async with opened(uri(server, "least")) as store:
        assert await store.accounts.find(HASH, NOW) is None
        await store.events.deliver([event()])
        assert await store.spending.exchange("key-1", "0" * 16, SPENT) == SPENT
    with server.connect(username="least", password=PASSWORD, authSource="cgc") as least:
        forbidden: list[Callable[[], object]] = [
            lambda: least.cgc.api_keys.insert_one({}),
            lambda: least.cgc.api_keys.update_one({}, {"$set": {"date_expiry": None}}),
            lambda: least.cgc.api_keys.delete_many({}),
            lambda: least.cgc.other.find_one(),
            lambda: least.billing.events_oneoff.find_one(),
            lambda: least.billing.events_oneoff.update_one({}, {"$set": {"quantity": 0}}),
            lambda: least.billing.events_oneoff.delete_many({}),
            lambda: least.billing.events_oneoff.drop(),
            lambda: least.billing.other.insert_one({}),
            lambda: least.llmproxy.limits.delete_many({}),
            lambda: least.llmproxy.limits.drop(),
            lambda: least.llmproxy.other.insert_one({}),
            lambda: least.admin.command("listDatabases", nameOnly=False, authorizedDatabases=False),
        ]
        for attempt in forbidden:
            with pytest.raises(pymongo.errors.OperationFailure) as caught:
                attempt()
            assert caught.value.code == 13


@pytest.mark.parametrize(
    ("roles", "complaint"),
    [
        (
            ROLES[1:],
            "does not let us find in cgc.api_keys: the user needs the role 'apiKeysReader'",
        ),
        (ROLES[:1], "does not let us insert in billing.events_oneoff"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_missing_role_is_named_at_the_start(server: Mongod, roles, complaint) -> None:
    name = f"only-{roles[0]['role']}"
    with contextlib.suppress(pymongo.errors.OperationFailure):
        create_user(server.client(), name, roles=roles)
    error = await refusal(uri(server, name))
    assert isinstance(error, ConfigError)
    assert complaint in str(error)


@pytest_twisted.ensureDeferred
async def test_a_start_leaves_nothing_in_the_database(server: Mongod) -> None:
    async with opened(uri(server)):
        pass
    assert server.client().billing.list_collection_names() == []
    assert "api_keys" not in server.client().cgc.list_collection_names()


@contextlib.contextmanager
def everything_logged() -> Iterator[list[str]]:
    texts: list[str] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        texts.append(f"{formatEvent(event)} {event!r}")

    globalLogPublisher.addObserver(observe)
    try:
        yield texts
    finally:
        globalLogPublisher.removeObserver(observe)


@pytest.mark.parametrize(
    ("user", "password", "more"),
    [
        ("llmproxy", "canary-wrong", ""),
        ("nobody", "canary-wrong", ""),
        ("llmproxy", "canary-wrong", "&authMechanism=SCRAM-SHA-1"),
        ("root", "canary-wrong", ""),  # a user of another database
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_wrong_password_is_a_clear_refusal(server: Mongod, user, password, more) -> None:
    began = time.monotonic()
    with everything_logged() as texts:
        error = await refusal(uri(server, user, password, more))
    assert isinstance(error, ConfigError)
    assert str(error).startswith("db.uri: MongoDB at 127.0.0.1:")
    assert f"refuses the user '{user}' of database 'cgc'" in str(error)
    assert not any("canary" in text for text in [str(error), repr(error), *texts])
    assert time.monotonic() - began < 2


@pytest_twisted.ensureDeferred
async def test_no_user_at_all_is_a_clear_refusal(server: Mongod) -> None:
    error = await refusal(f"mongodb://{server.address}/cgc")
    assert isinstance(error, ConfigError)
    assert "does not let us find" in str(error)


@pytest.mark.parametrize("offered", [["SCRAM-SHA-1"], ["SCRAM-SHA-256"]])
@pytest.mark.parametrize("asked", [False, True])
@pytest_twisted.ensureDeferred
async def test_either_mechanism_is_enough(server: Mongod, offered, asked) -> None:
    name = f"{offered[0]}-{asked}"
    create_user(server.client(), name, mechanisms=offered)
    more = f"&authMechanism={offered[0]}" if asked else ""
    async with opened(uri(server, name, more=more)) as store:
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_a_mechanism_that_the_user_lacks_is_refused(server: Mongod) -> None:
    create_user(server.client(), "old", mechanisms=["SCRAM-SHA-1"])
    error = await refusal(uri(server, "old", more="&authMechanism=SCRAM-SHA-256"))
    assert isinstance(error, ConfigError)


@pytest_twisted.ensureDeferred
async def test_odd_names_and_passwords_work(server: Mongod) -> None:
    create_user(server.client(), "o=d,d", "p@ss:/?#[]%+ \u2168\u00e4\u00ad")
    escaped = "p%40ss%3A%2F%3F%23%5B%5D%25%2B%20%E2%85%A8%C3%A4%C2%AD"
    async with opened(uri(server, "o%3Dd%2Cd", escaped)) as store:
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_the_user_s_database_can_be_the_path(server: Mongod) -> None:
    async with opened(f"mongodb://llmproxy:{PASSWORD}@{server.address}/cgc") as store:
        assert store.connected


# TLS


class Authority:
    """A certificate authority of one test run; writes PEM files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = self._subject("test authority")
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(self._pem(self._sign(self._name, self._key, [])))

    def issue(self, name: str, *addresses: str) -> Path:
        """A certificate with its key in one file, for `name` and some IP addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(name)]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        certificate = self._sign(self._subject(name), key, names)
        path = self._directory / f"{name}.pem"
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        path.write_bytes(
            self._pem(certificate) + key.private_bytes(serialization.Encoding.PEM, *form)
        )
        return path

    @staticmethod
    def _subject(name: str) -> x509.Name:
        # mongod takes a client with the server's own organization for a member of the cluster.
        unit = x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, f"unit of {name}")
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), unit])

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, names: Sequence[x509.GeneralName]
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder(issuer_name=self._name, subject_name=subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - dt.timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    @staticmethod
    def _pem(certificate: x509.Certificate) -> bytes:
        return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    directory = tmp_path_factory.mktemp("tls")
    # The account that runs mongod has to read the files.
    for parent in (directory, *directory.parents[:3]):
        if parent.owner() == Path.home().owner() and parent != Path("/tmp"):
            parent.chmod(0o755)
    return Authority(directory)


@pytest.fixture(scope="module")
def tls_server(authority: Authority) -> Iterator[Mongod]:
    """A server that takes TLS only, under the name `db.test` and its address."""
    files = TLSFiles(ca=authority.ca, server=authority.issue("db.test", "127.0.0.1"))
    with mongod.running(Mongod(tls=files)) as server:
        create_roles(server.client())
        create_user(server.client(), "llmproxy")
        subject = "OU=unit of client.test,CN=client.test"
        server.client()["$external"].command("createUser", subject, roles=ROLES)
        yield server


@pytest_twisted.ensureDeferred
async def test_tls_connects_to_the_server_that_the_authority_knows(tls_server, authority) -> None:
    async with opened(uri(tls_server, more=f"&tls=true&tlsCAFile={authority.ca}")) as store:
        await store.events.deliver([event()])
    assert stored(tls_server) == expected([event()])


@pytest_twisted.ensureDeferred
async def test_a_server_of_an_unknown_authority_gets_no_password(tls_server) -> None:
    error = await refusal(uri(tls_server, more="&tls=true"), 0.5)
    assert isinstance(error, StorageError)
    assert "certificate verify failed" in str(error)


@pytest_twisted.ensureDeferred
async def test_a_certificate_for_another_name_is_refused(tls_server, authority) -> None:
    address = uri(tls_server, more=f"&tls=true&tlsCAFile={authority.ca}")
    error = await refusal(address.replace("127.0.0.1", "localhost"), 0.5)
    assert isinstance(error, StorageError)
    assert "certificate verify failed" in str(error) or "Verification" in str(error)


@pytest.mark.parametrize(
    "more",
    ["&tlsCAFile={ca}&tlsAllowInvalidHostnames=true", "&tlsAllowInvalidCertificates=true"],
)
@pytest_twisted.ensureDeferred
async def test_the_operator_may_check_less(tls_server, authority, more: str) -> None:
    address = uri(tls_server, more=f"&tls=true{more.format(ca=authority.ca)}")
    async with opened(address.replace("127.0.0.1", "localhost")) as store:
        assert store.connected


@pytest_twisted.ensureDeferred
async def test_checking_less_of_the_name_still_checks_the_authority(tls_server) -> None:
    error = await refusal(uri(tls_server, more="&tls=true&tlsAllowInvalidHostnames=true"), 0.5)
    assert "certificate verify failed" in str(error)


@pytest_twisted.ensureDeferred
async def test_plain_text_to_a_tls_server_fails_in_time(tls_server) -> None:
    error = await refusal(uri(tls_server), 0.5)
    assert isinstance(error, StorageError)
    assert "connection lost" in str(error)


@pytest_twisted.ensureDeferred
async def test_a_certificate_can_be_the_credential(tls_server, authority) -> None:
    own = authority.issue("client.test")
    more = f"tlsCAFile={authority.ca}&tlsCertificateKeyFile={own}&authMechanism=MONGODB-X509"
    async with opened(f"mongodb://{tls_server.address}/?tls=true&{more}") as store:
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_a_certificate_of_no_user_is_a_clear_refusal(tls_server, authority) -> None:
    own = authority.issue("stranger.test")
    more = f"tlsCAFile={authority.ca}&tlsCertificateKeyFile={own}&authMechanism=MONGODB-X509"
    error = await refusal(f"mongodb://{tls_server.address}/?tls=true&{more}")
    assert isinstance(error, ConfigError)


def test_files_without_certificate_or_key_are_refused(authority, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    bad = [f"tlsCAFile={tmp_path}/empty", f"tlsCertificateKeyFile={authority.ca}"]
    for option in bad:
        with pytest.raises(ConfigError, match=r"^db\.uri: /"):
            connect(f"mongodb://h/?tls=true&{option}", reactor)


# Outages


@pytest_twisted.ensureDeferred
async def test_giving_up_in_the_middle_of_connecting_ends() -> None:
    # A refused endpoint takes 0.3 s to say so, and turns a cancellation into an error of its own.
    await refusal(f"mongodb://127.0.0.1:{free_port()}", 0.1)


@pytest_twisted.ensureDeferred
async def test_an_unreachable_server_is_a_storage_error_with_the_reason() -> None:
    error = await refusal(f"mongodb://127.0.0.1:{free_port()}", 1.0)
    assert isinstance(error, StorageError)
    assert "Connection was refused" in str(error)


@pytest_twisted.ensureDeferred
async def test_a_frozen_server_fails_a_key_within_two_seconds_and_is_used_again(server) -> None:
    async with opened(uri(server)) as store:
        server.pause()
        began = time.monotonic()
        with pytest.raises(StorageError, match="no answer within"):
            await store.accounts.find(HASH, NOW)
        assert 1.5 < time.monotonic() - began < 2.3
        server.resume()
        await eventually(lambda: store.connected)
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_a_connection_whose_answer_nobody_waits_for_any_more_is_given_up(server) -> None:
    async with opened(uri(server)) as store:
        await eventually(lambda: len(store.pool._ready) == POOL_SIZE)
        wires = set(store.pool._ready)
        server.pause()
        # Sooner than the connection's own limit, as a proxy's look-up of a key ends.
        given_up = store.accounts.find(HASH, NOW).addTimeout(0.1, reactor)
        with pytest.raises(DeferredTimeout):
            await given_up
        assert sum(wire.dead for wire in wires) == 1
        assert not any(wire.dead for wire in store.pool._free)
        server.resume()
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_a_long_outage_is_known_and_costs_no_time(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        server.kill()
        await eventually(lambda: not store.connected)
        with pytest.raises(StorageError):
            await store.accounts.find(HASH, NOW)
        began = time.monotonic()
        with pytest.raises(StorageError, match="Connection was refused"):
            await store.accounts.find(HASH, NOW)
        assert time.monotonic() - began < 0.1
        server.restart()
        await eventually(lambda: store.connected)
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_a_frozen_server_is_noticed_while_nothing_is_asked(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        server.pause()
        began = time.monotonic()
        await eventually(lambda: not store.connected)
        assert time.monotonic() - began < 5


@pytest_twisted.ensureDeferred
async def test_a_lost_connection_is_not_seen_by_who_asks_for_a_key(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        server.fail_command(1, failCommands=["find"], closeConnection=True)
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_an_error_for_a_key_is_neither_yes_nor_no(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        server.fail_command(1, failCommands=["find"], errorCode=50)
        with pytest.raises(StorageError, match="error 50"):
            await store.accounts.find(HASH, NOW)


@pytest_twisted.ensureDeferred
async def test_calls_beyond_the_bound_fail_at_once(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        server.pause()
        asked = [store.accounts.find(HASH, NOW) for _ in range(MAX_WAITING + 10)]
        failed = [deferred for deferred in asked if deferred.called]
        assert 1 <= len(failed) <= 10
        for deferred in failed:
            with pytest.raises(StorageError, match="too many calls"):
                await deferred
        server.resume()
        for deferred in asked:
            if deferred not in failed:
                assert await deferred is None


@pytest_twisted.ensureDeferred
async def test_a_cancelled_call_leaves_its_connection_usable(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        for _ in range(20):
            asked = store.accounts.find(HASH, NOW)
            asked.cancel()
            with pytest.raises(CancelledError):
                await asked
        assert await store.accounts.find(HASH, NOW) is None
        assert store.connected


@pytest_twisted.ensureDeferred
async def test_closing_fails_what_still_waits(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        server.pause()
        asked = [store.accounts.find(HASH, NOW) for _ in range(10)]
        await store.close()
        for deferred in asked:
            with pytest.raises(StorageError):
                await deferred
        with pytest.raises(StorageError):
            await store.accounts.find(HASH, NOW)


@pytest_twisted.ensureDeferred
async def test_a_changed_password_is_an_outage_that_ends(server: Mongod) -> None:
    create_user(server.client(), "changing")
    async with opened(uri(server, "changing")) as store:
        server.client().cgc.command("updateUser", "changing", pwd="other", writeConcern=DURABLE)
        server.restart()
        await eventually(lambda: not store.connected)
        await deferLater(reactor, 2.1)
        with pytest.raises(StorageError, match="refuses the user 'changing'"):
            await store.accounts.find(HASH, NOW)
        server.client().cgc.command("updateUser", "changing", pwd=PASSWORD)
        await eventually(lambda: store.connected)


# Delivery


@implementer(IOutbox)
class Outbox:
    """Rows in memory: what a journal on disk does, for events that come as a list."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.rows: dict[str, list[Event]] = {}
        for one in events:
            self.rows.setdefault(one.rid, []).append(one)

    def undelivered(self, limit: int) -> Deferred[Sequence[Event]]:
        rows = list(self.rows.values())[: min(limit, 25)]
        return succeed([event for events in rows for event in events])

    def mark_delivered(self, rids: Sequence[str]) -> Deferred[None]:
        for rid in rids:
            del self.rows[rid]
        return succeed(None)

    def backlog(self) -> Deferred[tuple[int, float]]:
        return succeed((len(self.rows), 0.0))


@contextlib.asynccontextmanager
async def delivering(store: MongoStore, events: Sequence[Event]) -> AsyncIterator[Delivery]:
    """Batches of 25 requests go out until none is left; the block runs meanwhile."""
    outbox = Outbox(events)
    assert verifyObject(IOutbox, outbox)
    delivery = Delivery(outbox, store.events, reactor, jitter=lambda: 0.1)
    delivery.startService()
    try:
        yield delivery
        await eventually(lambda: not outbox.rows, 30)
    finally:
        await delivery.stopService()


FAULTS: list[Document] = [
    {"errorCode": 10107},  # NotWritablePrimary
    {"errorCode": 91},  # ShutdownInProgress
    {"errorCode": 11602},  # InterruptedDueToReplStateChange
    {"errorCode": 13},  # Unauthorized
    {"errorCode": 50},  # MaxTimeMSExpired
    {"closeConnection": True},
    {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
    {"writeConcernError": {"code": 91, "errmsg": "shutting down"}},
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest_twisted.ensureDeferred
async def test_after_a_failed_insert_nothing_is_lost_or_doubled(server: Mongod, fault) -> None:
    async with opened(uri(server)) as store:
        server.fail_command(3, failCommands=["insert"], **fault)
        async with delivering(store, bill(100)) as delivery:
            pass
        assert delivery.failures_total == 3
    assert stored(server) == expected(bill(100))


@pytest_twisted.ensureDeferred
async def test_an_insert_that_was_applied_without_an_answer_is_not_doubled(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        server.pause()
        written = store.events.deliver(bill(50))
        await deferLater(reactor, 0.1)
        written.cancel()
        with pytest.raises(CancelledError):
            await written
        server.resume()
        await eventually(lambda: len(stored(server)) == 100)
        await store.events.deliver(bill(50))
    assert stored(server) == expected(bill(50))


@pytest.mark.parametrize("share", [1, 100, 300])
@pytest_twisted.ensureDeferred
async def test_killed_and_restarted_in_the_middle_nothing_is_lost_or_doubled(server, share) -> None:
    async with opened(uri(server)) as store, delivering(store, bill(500)):
        await eventually(lambda: len(stored(server)) >= share)
        server.restart()
    assert stored(server) == expected(bill(500))


async def acknowledged(store: MongoStore, events: Sequence[Event]) -> None:
    """Deliver `events`; connections that a restart has broken may fail first."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return await store.events.deliver(events)
        except StorageError:
            assert time.monotonic() < deadline
            await deferLater(reactor, 0.02)


@pytest_twisted.ensureDeferred
async def test_what_was_acknowledged_survives_a_crash_right_after(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        for number in range(3):
            events = [event(number, rid=f"request-{number}-{n}") for n in range(50)]
            await acknowledged(store, events)
            server.restart()  # kill -9, before anything else can happen here
            assert len(stored(server)) == 50 * (number + 1)


@pytest_twisted.ensureDeferred
async def test_connections_to_a_lost_primary_are_all_given_up(server: Mongod) -> None:
    async with opened(uri(server)) as store:
        await eventually(lambda: len(store.pool._ready) == POOL_SIZE)
        before = set(store.pool._ready)
        server.fail_command(1, failCommands=["insert"], errorCode=10107)
        with pytest.raises(StorageError, match="not the primary any more"):
            await store.events.deliver([event()])
        await eventually(lambda: len(store.pool._ready - before) == POOL_SIZE)


# A replica set


@pytest.fixture(scope="session")
def shared_set() -> ReplicaSet:
    replicas = mongod.replica_set()
    create_roles(replicas.client())
    create_user(replicas.client(), "llmproxy", writeConcern={"w": 3})
    return replicas


@pytest.fixture
def replicas(shared_set: ReplicaSet) -> Iterator[ReplicaSet]:
    """The shared set, all members awake, without documents."""
    shared_set.client().billing.events_oneoff.drop()
    yield shared_set
    for member in shared_set.members:
        member.ensure_running()


def set_uri(hosts: str, more: str = "") -> str:
    return f"mongodb://llmproxy:{PASSWORD}@{hosts}/?authSource=cgc{more}"


@pytest_twisted.ensureDeferred
async def test_step_downs_in_the_middle_lose_and_double_nothing(replicas: ReplicaSet) -> None:
    def has_stored(count: int) -> bool:
        return len(stored(replicas)) >= count

    events = bill(500)
    address = set_uri(replicas.seeds, "&replicaSet=rs0")
    async with opened(address) as store, delivering(store, events):
        for share in (200, 600):
            await eventually(functools.partial(has_stored, share))
            replicas.step_down()
    assert stored(replicas) == expected(events)


@pytest_twisted.ensureDeferred
async def test_a_primary_that_dies_in_the_middle_loses_and_doubles_nothing(replicas) -> None:
    events = bill(500)
    async with opened(set_uri(replicas.seeds)) as store, delivering(store, events):
        await eventually(lambda: len(stored(replicas)) >= 200)
        primary = replicas.primary()
        primary.kill()
    assert stored(replicas) == expected(events)
    primary.restart()


@pytest_twisted.ensureDeferred
async def test_keys_can_be_looked_up_soon_after_a_step_down(replicas: ReplicaSet) -> None:
    async with opened(set_uri(replicas.seeds)) as store:
        replicas.step_down()
        began = time.monotonic()
        while True:
            try:
                assert await store.accounts.find(HASH, NOW) is None
                break
            except StorageError:
                assert time.monotonic() - began < 5


@pytest_twisted.ensureDeferred
async def test_a_secondary_shows_the_way_to_the_primary(replicas: ReplicaSet) -> None:
    primary = replicas.primary()
    secondary = next(member for member in replicas.members if member is not primary)
    async with opened(set_uri(secondary.address)) as store:
        await store.events.deliver([event()])
    assert stored(replicas) == expected([event()])


@pytest_twisted.ensureDeferred
async def test_a_direct_connection_to_a_secondary_is_not_redirected(replicas: ReplicaSet) -> None:
    primary = replicas.primary()
    secondary = next(member for member in replicas.members if member is not primary)
    error = await refusal(set_uri(secondary.address, "&directConnection=true"), 0.5)
    assert isinstance(error, StorageError)
    assert "not a primary" in str(error)


@pytest_twisted.ensureDeferred
async def test_a_dead_member_in_the_list_does_not_matter(replicas: ReplicaSet) -> None:
    hosts = f"127.0.0.1:{free_port()},{replicas.seeds}"
    async with opened(set_uri(hosts)) as store:
        assert await store.accounts.find(HASH, NOW) is None


@pytest_twisted.ensureDeferred
async def test_another_set_is_refused(replicas: ReplicaSet, server: Mongod) -> None:
    error = await refusal(set_uri(replicas.seeds, "&replicaSet=other"))
    assert isinstance(error, ConfigError)
    assert "replicaSet is 'other', but" in str(error)
    error = await refusal(uri(server, more="&replicaSet=rs0"))
    assert isinstance(error, ConfigError)
    assert "no member of a replica set" in str(error)


@pytest_twisted.ensureDeferred
async def test_a_duplicate_that_has_not_reached_the_majority_is_no_success(
    replicas: ReplicaSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmproxy.storage.mongo.INSERT_TIMEOUT_S", 0.6)
    primary = replicas.primary()
    async with opened(set_uri(primary.address)) as store:
        for member in replicas.members:
            if member is not primary:
                member.pause()
        with pytest.raises(StorageError, match="write concern: error 64"):
            await store.events.deliver(bill(5))
        # It is a duplicate now, but could still be rolled back.
        with pytest.raises(StorageError, match="write concern: error 64"):
            await store.events.deliver(bill(5))
        for member in replicas.members:
            member.resume()
        monkeypatch.undo()
        async with delivering(store, bill(5)):
            pass
    assert stored(replicas) == expected(bill(5))


@pytest_twisted.ensureDeferred
async def test_ipv6_members_are_reached() -> None:
    with mongod.running(Mongod(ipv6=True)) as server:
        create_roles(server.client())
        create_user(server.client(), "llmproxy")
        async with opened(uri(server).replace("127.0.0.1", "[::1]")) as store:
            assert await store.accounts.find(HASH, NOW) is None


# sample.js and the snippets of the docs: run by node, on a `db` that notes what it is told

SHELL = """
const calls = [];
const note = (db, collection, method) => (...args) => {
  calls.push({db, collection, method, args});
  return {toArray: () => []};
};
const proxy = (get) => new Proxy({}, {get: (_, name) => get(name)});
const collection = (db, name) => proxy((method) => note(db, name, method));
const db = {getSiblingDB: (name) => proxy((member) => (
  member === "getCollection" ? (other) => collection(name, other)
  : ["createRole", "createUser", "grantRolesToUser"].includes(member) ? note(name, null, member)
  : collection(name, member)))};
const passwordPrompt = () => "canary-password";
Date.prototype.toJSON = function () { return {$date: this.toISOString()}; };
"""


def run_in_shell(script: str) -> list[Document]:
    """The calls that a mongosh script makes."""
    source = f"{SHELL}\n{script}\nprocess.stdout.write(JSON.stringify(calls));"
    done = subprocess.run(["node", "-"], input=source.encode(), capture_output=True, check=True)
    calls: list[Document] = json.loads(done.stdout, object_hook=_date)
    return calls


def _date(value: Document) -> Any:
    if value.keys() == {"$date"}:
        return datetime.fromisoformat(value["$date"])
    return value


def replay(client: mongod.Client, calls: Sequence[Document]) -> None:
    for call in calls:
        database = client[call["db"]]
        first, *rest = call["args"]
        if call["method"] in ("createRole", "createUser"):
            kind = call["method"].removeprefix("create").lower()
            database.command(call["method"], first.pop(kind), **first)
        elif call["method"] == "grantRolesToUser":
            database.command(call["method"], first, roles=rest[0])
        elif call["method"] == "updateOne":
            change, *options = rest
            database[call["collection"]].update_one(
                first, change, **(options[0] if options else {})
            )
        else:
            assert call["method"] in ("insertOne", "createIndex", "find", "deleteMany")
            method = re.sub("([A-Z])", r"_\1", call["method"]).lower()
            getattr(database[call["collection"]], method)(first)


@pytest_twisted.ensureDeferred
async def test_the_sample_keys_work_as_they_say_and_load_twice(server: Mongod) -> None:
    script = (ROOT / "sample.js").read_text()
    replay(server.client(), run_in_shell(script))
    replay(server.client(), run_in_shell(script))
    assert server.client().cgc.api_keys.count_documents({}) == 3
    tokens = {
        "df3e6b0bb66ceaadca4f84cbc371fd66e04d20fe51fc414da8d1b84d31d178de": False,
        "d8cc7aed3851ac3338fcc15df3b6807b89125837f77a75b9ecb13ed2afe3b49f": True,
        "5d6b091416885eaa91283321b69dc526fc42c97783e4cdfdff7a945e3be1f9ef": True,
    }
    async with opened(uri(server)) as store:
        for secret, valid in tokens.items():
            account = await store.accounts.find(secret, datetime.now(UTC))
            assert (account is not None) == valid
        endless = await store.accounts.find(list(tokens)[1], datetime(2125, 1, 1, tzinfo=UTC))
        long = await store.accounts.find(list(tokens)[2], datetime(2125, 1, 1, tzinfo=UTC))
    assert endless is not None
    assert long is None


@pytest_twisted.ensureDeferred
async def test_the_snippets_of_the_docs_make_a_user_that_works() -> None:
    text = (ROOT / "docs" / "mongodb.md").read_text()
    snippets = re.findall(r"```javascript\n(.*?)```", text, re.DOTALL)
    with mongod.running(Mongod()) as server:
        replay(server.client(), run_in_shell("\n".join(snippets)))
        async with opened(uri(server)) as store:
            found = await store.accounts.find("HASH", NOW)
            assert found is not None
            assert found.limits == OwnLimits(cost_total=10_000_000)
            await store.events.deliver([event()])
            assert await store.spending.exchange("key-1", "0" * 16, SPENT) == SPENT


def test_the_document_s_id_is_in_the_document() -> None:
    assert event_document(event())["_id"] == event_id(event())
