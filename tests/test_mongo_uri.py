"""Connection strings: what they ask for, what is refused, and SRV names by real DNS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.names import client, common, dns, server
from twisted.names.authority import FileAuthority
from twisted.names.dns import Record_SOA, Record_SRV, Record_TXT

from llmproxy.errors import ConfigError, StorageError
from llmproxy.storage.mongo_uri import (
    Credentials,
    MongoAddress,
    TLSSettings,
    parse,
    resolve,
    system_resolver,
)


def credentials(uri: str) -> Credentials:
    found = parse(uri).credentials
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("uri", "hosts"),
    [
        ("mongodb://h", [("h", 27017)]),
        ("mongodb://H.Example:1/", [("h.example", 1)]),
        (
            "mongodb://a,b:2,[::1]:3,[fe80::1]",
            [("a", 27017), ("b", 2), ("::1", 3), ("fe80::1", 27017)],
        ),
        ("mongodb://%2Frun%2Fmongodb.sock/db", [("/run/mongodb.sock", None)]),
    ],
)
def test_hosts_come_in_every_form(uri: str, hosts: Sequence[Any]) -> None:
    assert parse(uri).hosts == tuple(hosts)


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("mongodb://u:p@h", "admin"),
        ("mongodb://u:p@h/cgc", "cgc"),
        ("mongodb://u:p@h/?authSource=cgc", "cgc"),
        ("mongodb://u:p@h/other?authsource=cgc", "cgc"),
    ],
)
def test_the_user_belongs_to_a_database(uri: str, source: str) -> None:
    assert credentials(uri).source == source


def test_user_and_password_are_unescaped() -> None:
    found = credentials("mongodb://us%40er:p%2Fa%3As%25s%2B+%C3%A4@h/")
    assert (found.username, found.password) == ("us@er", "p/a:s%s+ ä")


def test_no_password_is_shown() -> None:
    address = parse(
        "mongodb://u:canary@h/?tls=true&tlsCertificateKeyFilePassword=canary&authSource=cgc"
    )
    assert "canary" not in repr(address)


def test_without_a_user_nobody_logs_in() -> None:
    assert parse("mongodb://h/db").credentials is None


def test_x509_needs_no_user(tmp_path: Path) -> None:
    (tmp_path / "c.pem").touch()
    uri = f"mongodb://h/?authMechanism=MONGODB-X509&tlsCertificateKeyFile={tmp_path}/c.pem"
    assert credentials(uri) == Credentials(
        mechanism="MONGODB-X509", source="$external", username=None
    )


def test_options_of_the_set_are_taken() -> None:
    address = parse(
        "mongodb://h/?replicaSet=rs0&directConnection=true&appName=a&readConcernLevel=majority"
    )
    assert (address.replica_set, address.direct) == ("rs0", True)
    assert (address.app_name, address.read_concern) == ("a", "majority")


@pytest.mark.parametrize(
    ("options", "tls"),
    [
        ("", None),
        ("tls=false", None),
        ("tls=true", TLSSettings()),
        ("ssl=true", TLSSettings()),
        ("tlsCAFile={file}", TLSSettings(ca_file="{file}")),
        ("tls=true&tlsInsecure=true", TLSSettings(check_certificate=False, check_hostname=False)),
        ("tls=true&tlsAllowInvalidHostnames=true", TLSSettings(check_hostname=False)),
        (
            "tls=true&tlsAllowInvalidCertificates=true",
            TLSSettings(check_certificate=False, check_hostname=False),
        ),
        (
            "tls=true&tlsCertificateKeyFile={file}&tlsCertificateKeyFilePassword=p",
            TLSSettings(key_file="{file}", key_password="p"),
        ),
    ],
)
def test_tls_is_what_the_options_say(options: str, tls: TLSSettings | None, tmp_path: Path) -> None:
    file = str(tmp_path / "file.pem")
    Path(file).touch()
    found = parse(f"mongodb://h/?{options.format(file=file)}" if options else "mongodb://h").tls
    assert repr(found) == repr(tls).replace("{file}", file)


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("mongodb://h/?readPreference=secondary", "readPreference can only be primary"),
        ("mongodb://h/?readPreference=primaryPreferred", "readPreference can only be primary"),
        ("mongodb://h/?w=1", "w can only be majority"),
        ("mongodb://h/?w=0", "w can only be majority"),
        ("mongodb://h/?journal=false", "journal can only be true"),
        ("mongodb://h/?loadBalanced=true", "loadBalanced can only be false"),
        ("mongodb://h/?authMechanismProperties=A:b", "authMechanismProperties can only be nothing"),
        ("mongodb://h/?proxyHost=x", "proxyHost is not supported"),
        ("mongodb://h/?tlsCRLFile=/x", "tlsCRLFile is not supported"),
        ("mongodb://h/?replicaset=a&nonsense=1", "nonsense is not supported"),
        ("mongodb://h/?srvMaxHosts=1", "srvMaxHosts goes with mongodb+srv://"),
        ("mongodb://h/?tlsCAFile=/nowhere/ca.pem", "/nowhere/ca.pem: No such file"),
        ("mongodb://u:p@h/?authMechanism=PLAIN", "authMechanism can only be"),
        ("mongodb://h/?authMechanism=SCRAM-SHA-256", "need a user"),
        ("mongodb://h/?authSource=cgc", "need a user"),
        ("mongodb://u@h", "has no password"),
        ("mongodb://u:p@h/?authMechanism=MONGODB-X509", "needs tlsCertificateKeyFile"),
        ("http://h", "expected mongodb://"),
        ("mongodb://", "not a valid"),
        ("mongodb://h/?tls=perhaps", "not a valid"),
        ("mongodb://h/?replicaSet=a&replicaSet=b", "not a valid"),
        ("mongodb://a,b/?directConnection=true", "not a valid"),
        ("mongodb+srv://c.example.com:27017/", "one host name, without a port"),
        ("mongodb+srv://a.example.com,b.example.com/", "one host name"),
        ("mongodb+srv://c.example.com/?directConnection=true", "one host name"),
        ("mongodb+srv://c.example.com/?srvMaxHosts=x", "srvMaxHosts"),
    ],
)
def test_what_would_not_be_honoured_is_refused(uri: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=r"^db\.uri: ") as caught:
        parse(uri)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://u:canary@canary@h/",
        "mongodb://u:can/canary@h/",
        "mongodb://u:1/canary@h/",
        "mongodb://u:1?canary@h/",
        "mongodb://u:1?canary=canary@h/",
        "mongodb://u:canary%zz@h/",
        "mongodb://u:canary:canary@h/",
        "mongodb://u:canary@h:canary/",
        "mongodb://u:canary@h/?tls=canary",
        "mongodb+srv://u:1/canary@c.example.com/",
        "canary://u:canary@h/",
    ],
)
def test_no_part_of_a_password_is_in_a_complaint(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(uri)
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_options_that_tune_a_driver_are_let_through() -> None:
    parse(
        "mongodb://h/?retryWrites=true&w=majority&maxPoolSize=5&connectTimeoutMS=1&compressors=zlib"
    )


def test_a_srv_name_means_tls_unless_it_is_switched_off() -> None:
    assert parse("mongodb+srv://c.example.com/").tls == TLSSettings()
    assert parse("mongodb+srv://c.example.com/?tls=false").tls is None


# SRV names, asked of a name server on loopback

SERVICE = "_mongodb._tcp.c.example.com"


class Zone(FileAuthority):
    """A name server's data for example.com."""

    def __init__(self, records: dict[str, list[Any]]) -> None:
        common.ResolverBase.__init__(self)
        self._cache: dict[str, Any] = {}
        soa = Record_SOA(mname="ns.example.com", rname="root.example.com")
        known = {name.encode(): found for name, found in records.items()}
        vars(self).update(soa=(b"example.com", soa), records={b"example.com": [soa], **known})


def srv(target: str, port: int) -> Record_SRV:
    return Record_SRV(0, 0, port, target)


@pytest.fixture
def name_server() -> Iterator[Any]:
    """Call it with records: it serves them, and returns a resolver that asks for them."""
    ports = []

    def serve(records: dict[str, list[Any]]) -> Any:
        factory = server.DNSServerFactory(authorities=[Zone(records)])
        protocol = dns.DNSDatagramProtocol(factory)
        ports.append(reactor.listenUDP(0, protocol, interface="127.0.0.1"))  # type: ignore[attr-defined]
        servers = [("127.0.0.1", ports[-1].getHost().port)]
        return client.Resolver(servers=servers, timeout=(1,), reactor=reactor)

    yield serve
    for port in ports:
        pytest_twisted.blockon(port.stopListening())


@pytest_twisted.ensureDeferred
async def test_a_srv_name_stands_for_its_hosts_and_options(name_server) -> None:
    resolver = name_server(
        {
            SERVICE: [srv("a.example.com", 27017), srv("b.example.com", 27018)],
            "c.example.com": [Record_TXT(b"authSource=cgc&", b"replicaSet=rs0")],
        }
    )
    address = await resolve(parse("mongodb+srv://u:p@c.example.com/"), resolver)
    assert sorted(address.hosts) == [("a.example.com", 27017), ("b.example.com", 27018)]
    assert address.replica_set == "rs0"
    assert address.credentials is not None
    assert address.credentials.source == "cgc"
    assert address.tls is not None
    assert address.srv_name is None


@pytest_twisted.ensureDeferred
async def test_the_string_outweighs_the_txt_record(name_server) -> None:
    resolver = name_server(
        {
            SERVICE: [srv("a.example.com", 1)],
            "c.example.com": [Record_TXT(b"authSource=x&replicaSet=x")],
        }
    )
    uri = "mongodb+srv://u:p@c.example.com/?authSource=cgc&replicaSet=rs0"
    address = await resolve(parse(uri), resolver)
    assert address.credentials is not None
    assert (address.credentials.source, address.replica_set) == ("cgc", "rs0")


@pytest_twisted.ensureDeferred
async def test_a_srv_name_needs_no_txt_record(name_server) -> None:
    resolver = name_server({SERVICE: [srv("a.example.com", 1)]})
    address = await resolve(parse("mongodb+srv://c.example.com/"), resolver)
    assert address.hosts == (("a.example.com", 1),)


@pytest_twisted.ensureDeferred
async def test_service_name_and_number_of_hosts_can_be_chosen(name_server) -> None:
    records = [srv(f"{letter}.example.com", 1) for letter in "abcd"]
    resolver = name_server({"_bills._tcp.c.example.com": records})
    uri = "mongodb+srv://c.example.com/?srvServiceName=bills&srvMaxHosts=2"
    assert len((await resolve(parse(uri), resolver)).hosts) == 2


@pytest.mark.parametrize(
    "records",
    [
        {SERVICE: [srv("a.elsewhere.com", 1)]},
        {SERVICE: [srv("example.com", 1)]},
        {SERVICE: [srv("evilexample.com", 1)]},
        {SERVICE: [srv("a.example.com", 1)], "c.example.com": [Record_TXT(b"tls=false")]},
        {SERVICE: [srv("a.example.com", 1)], "c.example.com": [Record_TXT(b"loadBalanced=true")]},
        {
            SERVICE: [srv("a.example.com", 1)],
            "c.example.com": [Record_TXT(b"replicaSet=a"), Record_TXT(b"replicaSet=b")],
        },
    ],
)
@pytest_twisted.ensureDeferred
async def test_dns_cannot_send_us_elsewhere_or_change_more_than_it_may(
    name_server, records
) -> None:
    with pytest.raises(ConfigError, match=r"^db\.uri: "):
        await resolve(parse("mongodb+srv://u:p@c.example.com/"), name_server(records))


@pytest_twisted.ensureDeferred
async def test_a_srv_name_that_does_not_exist_is_an_outage(name_server) -> None:
    with pytest.raises(StorageError, match="no SRV records"):
        await resolve(parse("mongodb+srv://u:p@c.example.com/"), name_server({}))


@pytest_twisted.ensureDeferred
async def test_other_addresses_ask_no_name_server() -> None:
    address: MongoAddress = parse("mongodb://h")
    assert await resolve(address, None) is address  # type: ignore[arg-type]


def test_the_system_s_name_servers_are_asked(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# comment\nnameserver ::1\nnameserver 192.0.2.1\nsearch example.com\n")
    resolver: Any = system_resolver(reactor, str(path))
    assert resolver.servers == [("192.0.2.1", 53)]


def test_without_a_list_the_local_name_server_is_asked(tmp_path: Path) -> None:
    resolver: Any = system_resolver(reactor, str(tmp_path / "missing"))
    assert resolver.servers == [("127.0.0.1", 53)]
