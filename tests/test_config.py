"""The configuration: what is accepted, what is refused and how, and the shipped example."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
from certificates import self_signed

from llmproxy import config
from llmproxy.config import Backend, Config, Database, LedgerConfig, PriceEntry, Replica
from llmproxy.errors import ConfigError
from llmproxy.model import BUDGETS

ROOT = Path(__file__).parent.parent
BACKEND = {"url": "http://gpu1:8000", "device": "H100"}
PEM = self_signed().strip()
CERTIFICATE, KEY = PEM.split("\n\n")


def parse(text: str, **options: Any) -> Config:
    return config.parse(tomllib.loads(text), **options)


def errors_of(text: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, **options)
    return str(caught.value).splitlines()


def backend(**settings: object) -> Backend:
    return config.parse({"backends": {"m": BACKEND | settings}}).backends["m"]


def backend_errors(**settings: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        backend(**settings)
    return str(caught.value).splitlines()


def test_nothing_given_is_the_default_configuration() -> None:
    assert parse("") == Config()


def test_every_setting_is_read() -> None:
    text = """
    log_level = "debug"
    log_format = "json"
    workers = 4
    timeout_connect = 1
    timeout_read = 2.5
    client_max_size = 100
    max_json_body = 10
    http_origin = "https://chat.example.org"
    keepalive_interval = 0
    drain_deadline = 0
    auth_stale_max = 0
    auth_fresh = 0.5
    failed_keys_per_minute = 0
    listen = ["tcp:80", "unix:/run/x.sock", "systemd:domain=INET:index=0"]
    [db]
    uri = "mongodb://h/db"
    [admin]
    listen = "tcp:9"
    [metrics]
    enabled = false
    [ledger]
    path = "j.sqlite"
    [limits]
    requests_per_minute = 600
    concurrent_requests = 8
    tokens_total = 0
    cost_per_month = 9_000_000_000_000_000
    [backends.m]
    url = "https://gpu1:8000/v1/"
    token = "s3"
    device = "H100"
    model = "other/name"
    verify_ssl = false
    ca_file = "a.pem"
    client_cert_file = "b.pem"
    client_key_file = "b.key"
    timeout = 7
    max_model_len = 9
    usage = "continuous"
    on_disconnect = "cancel"
    drain_timeout = 8
    drain_max_tokens = 10
    """
    files = {"a.pem": CERTIFICATE, "b.pem": CERTIFICATE, "b.key": KEY}
    assert parse(text, read_text=lambda path: files[str(path)]) == Config(
        log_level="DEBUG",
        log_format="json",
        workers=4,
        timeout_connect=1.0,
        timeout_read=2.5,
        client_max_size=100,
        max_json_body=10,
        http_origin="https://chat.example.org",
        keepalive_interval=0.0,
        drain_deadline=0.0,
        auth_stale_max=0.0,
        auth_fresh=0.5,
        failed_keys_per_minute=0,
        listen=("tcp:80", "unix:/run/x.sock", "systemd:domain=INET:index=0"),
        db=Database(uri="mongodb://h/db"),
        admin=config.Admin(listen=("tcp:9",)),
        metrics=config.Metrics(enabled=False),
        ledger=LedgerConfig(path=Path("j.sqlite")),
        limits=config.KeyLimits(
            requests_per_minute=600,
            concurrent_requests=8,
            tokens_total=0,
            cost_per_month=9 * 10**15,
        ),
        backends={
            "m": Backend(
                name="m",
                url="https://gpu1:8000",
                token="s3",
                device="H100",
                model="other/name",
                verify_ssl=False,
                ca=CERTIFICATE,
                client_cert=CERTIFICATE,
                client_key=KEY,
                timeout=7.0,
                max_model_len=9,
                usage="continuous",
                on_disconnect="cancel",
                drain_timeout=8.0,
                drain_max_tokens=10,
            )
        },
    )


def test_host_port_and_certificate_are_read() -> None:
    found = parse('host = "::1"\nport = 0\ncert = "c.pem"\nkey = "/k.pem"', base=Path("/etc/p"))
    assert (found.host, found.port) == ("::1", 0)
    assert (found.cert, found.key) == (Path("/etc/p/c.pem"), Path("/k.pem"))


def test_backends_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        config.parse({"backends": {"m": BACKEND}}).backends["x"] = backend()  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("port = true", "port: expected a whole number, 0 to 65535, got true"),
        ("port = 8080.0", "port: expected a whole number, 0 to 65535, got 8080.0"),
        ("port = 65536", "port: expected a whole number, 0 to 65535, got 65536"),
        ("workers = 0", "workers: expected a whole number, 1 to 1024, got 0"),
        (
            "client_max_size = 0",
            "client_max_size: expected a whole number, 1 to 9223372036854775807, got 0",
        ),
        ("timeout_read = 0", "timeout_read: expected a number > 0, at most 2000000, got 0"),
        ("timeout_read = nan", "timeout_read: expected a number > 0, at most 2000000, got NaN"),
        (
            "timeout_read = inf",
            "timeout_read: expected a number > 0, at most 2000000, got Infinity",
        ),
        ("timeout_read = 1" + "0" * 400, None),
        ("timeout_read = 0x" + "f" * 5000, None),
        ("timeout_read = false", "timeout_read: expected a number > 0, at most 2000000, got false"),
        ("auth_fresh = -1", "auth_fresh: expected a number >= 0, at most 2000000, got -1"),
        ("host = 1", "host: expected an address or a host's name, got 1"),
        ('host = ""', 'host: expected an address or a host\'s name, got ""'),
        ("[metrics]\nenabled = 1", "metrics.enabled: expected true or false, got 1"),
        ("metrics = 1", "metrics: expected a table"),
        ("backends = 1", "backends: expected a table"),
        ("backends.m = 1", "backends.m: expected a table"),
        ('log_format = "xml"', 'log_format: expected one of "text", "json", got "xml"'),
        ("log_level = []", None),
        ('cert = ""\nkey = "k"', 'cert: expected a path, got ""'),
        ('http_origin = "a b"', None),
        ('http_origin = "https://a\\r\\nX: y"', None),
        ('http_origin = "https://example.org/"', None),
        ('listen = ["8080"]', None),
        ("listen = [1]", None),
        ('listen = [["tcp:1"]]', None),
        ('admin.listen = ""', None),
        (
            "failed_keys_per_minute = -1",
            "failed_keys_per_minute: expected a whole number, 0 to 1000000, got -1",
        ),
        (
            "limits.requests_per_minute = 0.5",
            "limits.requests_per_minute: expected a whole number, 0 to 1000000, got 0.5",
        ),
        (
            "limits.tokens_per_minute = -1",
            "limits.tokens_per_minute: expected a whole number, 0 to 1000000000, got -1",
        ),
        *(
            (
                f"limits.{name} = {value}",
                f"limits.{name}: expected a whole number, 0 to 9000000000000000, got {value}",
            )
            for name in BUDGETS
            for value in ("-1", "0.5", "9000000000000001", "true", '"1"')
        ),
        ("ledger.path = 1", "ledger.path: expected a path, got 1"),
        ("port = 2020-01-01", 'port: expected a whole number, 0 to 65535, got "2020-01-01"'),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(text: str, error: str | None) -> None:
    found = errors_of(text)
    assert len(found) == 1
    path = re.findall(r"[\w.]+", text)[0]
    assert found[0].startswith((f"{path}: expected", f"{path}.enabled: expected"))
    assert error in (None, found[0])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("prot = 1", "prot: unknown setting; did you mean port?"),
        ("db.url = 'x'", "db.url: unknown setting; did you mean uri?"),
        ("zzzzzz = 1", "zzzzzz: unknown setting"),
        ("key_file = 1", None),
    ],
)
def test_an_unknown_setting_is_refused(text: str, error: str | None) -> None:
    (found,) = errors_of(text)
    assert ": unknown setting" in found
    assert error in (None, found)


def test_a_backend_has_no_setting_called_name() -> None:
    (error,) = backend_errors(name="x")
    assert error.startswith("backends.m.name: unknown setting")


def test_all_mistakes_are_reported_at_once() -> None:
    found = errors_of('port = "x"\nbad = 1\n[backends.a]\ndevice = "d"\n[backends.b]\nurl = 3')
    assert [line.partition(":")[0] for line in found] == [
        "port",
        "backends.a.url",
        "backends.b.url",
        "backends.b.device",
        "bad",
    ]


def test_an_unquoted_dot_in_a_name_is_explained() -> None:
    errors = errors_of('[backends.Llama-3.1-8B]\nurl = "http://h"\ndevice = "d"')
    assert errors[0] == (
        "backends.Llama-3.1-8B: unknown setting; "
        'a name with a dot is written in quotes: [backends."Llama-3.1-8B"]'
    )


def test_a_path_quotes_a_name_as_toml_does() -> None:
    (error,) = errors_of('[backends."a/b:c"]\nurl = "http://h"')
    assert error == 'backends."a/b:c".device: missing'


@pytest.mark.parametrize("name", ["", "a\nb", " a", "a\u202eb", "\x7f"])
def test_a_name_with_control_characters_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^backends\..*expected a name"):
        config.parse({"backends": {name: BACKEND}})


@pytest.mark.parametrize("name", ["a", "meta-llama/Llama-3.1", "/models/x", "llama3:8b", "żółw"])
def test_names_of_models_are_taken_as_they_are(name: str) -> None:
    assert config.parse({"backends": {name: BACKEND}}).backends[name].name == name


@pytest.mark.parametrize("device", ["", "a/b", "a\tb", 1])
def test_a_device_that_would_spoil_a_product_is_refused(device: object) -> None:
    (error,) = backend_errors(device=device)
    assert error.startswith('backends.m.device: expected a text without "/"')


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("https://h/llm/v1", "https://h/llm"),
        ("http://[::1]:80/api/v10", "http://[::1]:80/api/v10"),
        ("http://GPU-1.example.org.:80", "http://GPU-1.example.org.:80"),
    ],
)
def test_a_url_is_kept_without_v1(url: str, kept: str) -> None:
    assert backend(url=url).url == kept


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "ftp://h",
        "http://",
        "http://:80",
        "http://h:99999",
        "http://h:x",
        "http://h:0",
        "http://u:canary@h",
        "http://h/?key=canary",
        "http://h/#canary",
        "http://h/a b",
        "http://h/\r\nX: y",
        "http://[h",
        "http://my_backend:8000",
        "http://a..b",
        "http://-a",
        f"http://{'a' * 64}.org",
        "",
        1,
    ],
)
def test_a_url_that_is_none_is_refused_and_not_shown(url: object) -> None:
    (error,) = backend_errors(url=url)
    assert error.startswith("backends.m.url: expected a URL")
    assert "canary" not in error


@pytest.mark.parametrize("token", ["", "can ary", "canary\r\nX: y", "canaryż", 1, ["canary"]])
def test_a_bad_token_is_refused_and_not_shown(token: object) -> None:
    (error,) = backend_errors(token=token)
    assert error == "backends.m.token: expected a text of visible ASCII characters"


def test_a_token_is_not_in_the_repr() -> None:
    assert "canary" not in repr(config.parse({"backends": {"m": BACKEND | {"token": "canary"}}}))


def test_a_token_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("canary\n")
    found = parse(
        '[backends.m]\nurl = "http://h"\ndevice = "d"\ntoken_file = "token"', base=tmp_path
    )
    assert found.backends["m"].token == "canary"


def test_a_token_file_that_is_missing_is_named() -> None:
    (error,) = backend_errors(token_file="/nowhere/token")
    assert error == (
        'backends.m.token_file: can\'t read "/nowhere/token": No such file or directory'
    )


def test_a_token_file_with_something_else_is_refused_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("canary canary")
    (tmp_path / "b").write_bytes(b"canary\xff")
    (error,) = backend_errors(token_file=str(tmp_path / "a"))
    assert error == "backends.m.token_file: expected a text of visible ASCII characters"
    (error,) = backend_errors(token_file=str(tmp_path / "b"))
    assert error == f'backends.m.token_file: "{tmp_path}/b" is not UTF-8 text'


def test_a_token_and_a_token_file_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("canary")
    (error,) = backend_errors(token="x", token_file=str(tmp_path / "token"))
    assert error == "backends.m.token: can't be given together with token_file"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite://db.sqlite", Path("/base/db.sqlite")),
        ("sqlite:///var/db.sqlite", Path("/var/db.sqlite")),
        ("mongodb://h/db", None),
        ("mongodb+srv://u:p@h/?authSource=cgc", None),
    ],
)
def test_a_database_is_a_file_or_a_mongodb(uri: str, path: Path | None) -> None:
    database = config.parse({"db": {"uri": uri}}, Path("/base")).db
    assert database.sqlite_path == path
    assert database.is_mongodb == (path is None)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite://:memory:",
        "sqlite:///:memory:",
        "sqlite://",
        "sqlite:///",
        "db.sqlite",
        "postgres://u:canary@h",
        "mongodb://",
        "mongodb://u:canary@",
        1,
    ],
)
def test_another_database_is_refused_and_not_shown(uri: object) -> None:
    with pytest.raises(ConfigError, match=r"^db.uri: expected sqlite://PATH") as caught:
        config.parse({"db": {"uri": uri}})
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "safe"),
    [
        ("mongodb://u:canary@h/db", "mongodb://u:***@h/db"),
        ("mongodb://u:can@ry@h,i:1/db?a=b", "mongodb://u:***@h,i:1/db?a=b"),
        ("mongodb://u:canary/x@h/db", "mongodb://u:***@h/db"),
        ("mongodb+srv://u@h/db", "mongodb+srv://u@h/db"),
        ("mongodb://h/?tlsCertificateKeyFilePassword=canary&w=1", None),
        ("mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:canary", None),
        ("sqlite:///a/password:x@b", "sqlite:///a/password:x@b"),
    ],
)
def test_the_password_is_not_shown(uri: str, safe: str | None) -> None:
    database = Database(uri=uri)
    assert safe in (None, database.safe_uri)
    assert "can" not in repr(Config(db=database))


def test_the_database_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "uri").write_text("mongodb://u:p@h/db\n")
    assert parse('db.uri_file = "uri"', base=tmp_path).db.uri == "mongodb://u:p@h/db"


def test_the_environment_overrides_the_database(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[db]\nuri_file = "/nowhere"\n')
    assert config.load(path, {"LLMPROXY_DB_URI": "mongodb://h"}).db.uri == "mongodb://h"


def test_a_bad_database_in_the_environment_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"^LLMPROXY_DB_URI: expected") as caught:
        config.load(path, {"LLMPROXY_DB_URI": "redis://canary"})
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ('cert = "c"', ["key: missing, as cert is given"]),
        ('key = "c"', ["cert: missing, as key is given"]),
        (
            'listen = "tcp:1"\nhost = "h"\nport = 1',
            [
                "host: can't be given together with listen",
                "port: can't be given together with listen",
            ],
        ),
        (
            'listen = "tcp:1"\ncert = "c"\nkey = "k"',
            [
                "cert: can't be given together with listen; use an ssl: endpoint",
                "key: can't be given together with listen; use an ssl: endpoint",
            ],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str, errors: list[str]) -> None:
    assert errors_of(text) == errors


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("")
    found = config.load(path, {})
    assert found.db.sqlite_path == tmp_path / "db.sqlite"
    assert found.ledger.path == tmp_path / "ledger.sqlite"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"a = 1\nb = = 2\n", r"config.toml: not valid TOML: .*line 2"),
        (b"a = 1\na = 2\n", r"config.toml: not valid TOML: .*line 2"),
        (b"a = '\xff'", r"config.toml: is not UTF-8 text"),
        (None, r"config.toml: can't be read: No such file"),
        (b"a = " + b"9" * 5000, r"config.toml: not valid TOML"),
        (b"a = " + b"[" * 50000, r"config.toml: not valid TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_by_name(
    tmp_path: Path, content: bytes | None, error: str
) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=error):
        config.load(path, {})


def test_unreadable_certificates_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('cert = "c.pem"\nkey = "."\n')
    with pytest.raises(ConfigError) as caught:
        config.load(path, {})
    assert str(caught.value).splitlines() == [
        f'cert: can\'t read "{tmp_path}/c.pem": No such file or directory',
        f'key: can\'t read "{tmp_path}": Is a directory',
    ]
    assert config.load(path, {}, check=False).cert == tmp_path / "c.pem"


OTHER = self_signed().strip().split("\n\n")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"ca": "garbage"}, "ca: expected certificates in PEM"),
        ({"ca": PEM.replace("E", "F")}, "ca: expected certificates in PEM"),
        ({"ca": KEY}, "ca: expected certificates in PEM"),
        ({"client_cert": CERTIFICATE}, "client_key: missing, as client_cert is given"),
        ({"client_key": KEY}, "client_cert: missing, as client_key is given"),
        (
            {"client_cert": CERTIFICATE, "client_key": CERTIFICATE},
            "client_key: expected a private key in PEM, without a password",
        ),
        (
            {"client_cert": CERTIFICATE, "client_key": OTHER[1]},
            "client_key: the key is not that of the first certificate",
        ),
        (
            {"client_cert": f"{OTHER[0]}\n{CERTIFICATE}", "client_key": KEY},
            "client_key: the key is not that of the first certificate",
        ),
    ],
)
def test_certificates_of_a_backend_that_can_not_be_used_are_named(settings, error) -> None:
    assert backend_errors(**settings) == [f"backends.m.{error}"]


def test_a_backend_s_certificates_are_read_from_their_files(tmp_path: Path) -> None:
    for name, content in (("c", CERTIFICATE), ("k", KEY)):
        (tmp_path / name).write_text(content)
    text = '[backends.m]\nurl = "https://h"\ndevice = "d"\n'
    found = parse(
        f'{text}ca_file = "c"\nclient_cert_file = "c"\nclient_key_file = "k"', base=tmp_path
    )
    assert found.backends["m"].client_key == KEY
    assert KEY not in repr(found)
    assert errors_of(f'{text}client_cert_file = "k"\nclient_key_file = "x"', base=tmp_path) == [
        "backends.m.client_cert_file: expected certificates in PEM",
        f'backends.m.client_key_file: can\'t read "{tmp_path}/x": No such file or directory',
    ]


@pytest.mark.parametrize(
    ("option", "environ", "path"),
    [
        ("a.toml", {"LLMPROXY_CONFIG": "b.toml"}, "a.toml"),
        (None, {"LLMPROXY_CONFIG": "b.toml"}, "b.toml"),
        (None, {"LLMPROXY_CONFIG": ""}, "config.toml"),
        (None, {}, "config.toml"),
    ],
)
def test_the_file_is_found(option: str | None, environ: dict[str, str], path: str) -> None:
    assert config.find(option, environ) == Path(path)


def test_the_shipped_example_is_the_default_configuration() -> None:
    assert config.parse(tomllib.loads(config.default_text())) == Config()


def test_the_shipped_example_is_the_one_in_the_root() -> None:
    assert (ROOT / "config.toml").read_text() == config.default_text()


def documented() -> dict[str, set[str]]:
    """The settings named in the shipped example, commented out or not, by section."""
    section, found = "", dict[str, set[str]]()
    for line in config.default_text().splitlines():
        if heading := re.fullmatch(r"#?\[?\[(\w+)(\..*?)?\]?\]", line):
            section = heading[1]
        elif setting := re.match(r"#?(\w+) = ", line):
            found.setdefault(section, set()).add(setting[1])
    return found


def known() -> dict[str, set[str]]:
    """The settings that the dataclasses have, by section."""
    sections: dict[str, typing.Any] = {"": Config, "backends": Backend} | {
        name: hint
        for name, hint in typing.get_type_hints(Config).items()
        if dataclasses.is_dataclass(hint)
    }
    found = {section: named(cls) for section, cls in sections.items()}
    found["prices"] |= named(PriceEntry)
    found["backends"] |= named(Replica)
    return found


def named(cls: type) -> set[str]:
    return {
        name + suffix
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        for rule in getattr(hint, "__metadata__", ())
        for suffix in (("", "_file") if rule.secret else ("",))
    }


def test_the_shipped_example_names_every_setting_and_no_other() -> None:
    assert documented() == known()


def test_every_default_in_the_shipped_example_is_true() -> None:
    defaults = config.default_text().partition("# The backends:")[0]
    examples = (
        *("cert", "key", 'listen = ["tcp:8080', 'listen = ["ssl', 'uri = "mongo', "uri_file"),
        *BUDGETS,
    )
    lines = [
        line.removeprefix("#") for line in defaults.splitlines() if re.match(r"#?\w+ =|\[", line)
    ]
    text = "\n".join(line for line in lines if not line.startswith(examples))
    assert parse(text) == Config()
    given = tomllib.loads(text)
    settings = {key for key in known()[""] if key not in ("cert", "key", "listen")}
    assert settings <= given.keys()


def test_the_shipped_example_of_a_backend_is_valid() -> None:
    examples = config.default_text().partition("# The backends:")[2]
    lines = [line[1:] for line in examples.splitlines() if re.match(r"#(\w+ =|\[)", line)]
    text = "\n".join(line for line in lines if not line.startswith(("token_file", "ca", "client_")))
    assert parse(text).backends.keys() == {
        "meta-llama/Llama-3.1-8B-Instruct",
        "mistral",
        "gemma",
        "qwen",
        "whisper",
    }


@pytest.mark.parametrize(
    ("servers", "error"),
    [
        ({}, "backends.m.url: missing"),
        ({"url": "http://a", "urls": ["http://b"]}, "backends.m.urls: can't be given together"),
        ({"urls": ["http://b"], "replicas": [{"url": "http://a"}]}, "backends.m.replicas: can't"),
        ({"urls": []}, "backends.m.urls: expected a list of URLs"),
        ({"urls": ["http://a", "http://a/v1"]}, "backends.m.urls: expected a list of URLs"),
        ({"urls": ["ftp://canary"]}, "backends.m.urls: expected a list of URLs"),
        ({"replicas": []}, "backends.m.replicas: there are none"),
        ({"replicas": {"a": 1}}, "backends.m.replicas: expected a list"),
        ({"replicas": [{}]}, 'backends.m."replicas[0]".url: missing'),
        ({"replicas": [{"url": "http://a"}] * 2}, "backends.m.replicas: two of them have the same"),
        (
            {"replicas": [{"url": "http://a", "weight": 0}]},
            'backends.m."replicas[0]".weight: expected a whole number',
        ),
        ({"url": "http://a", "policy": "best"}, "backends.m.policy: expected one of"),
        ({"url": "http://a", "max_concurrent": -1}, "backends.m.max_concurrent: expected a whole"),
    ],
)
def test_where_a_model_is_is_told_in_one_way(servers: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse({"backends": {"m": {"device": "d", **servers}}})
    assert str(caught.value).startswith(error)
    assert "canary" not in str(caught.value)


def test_all_servers_of_a_model_are_found() -> None:
    urls = {"urls": ["http://a/v1", "http://b"], "device": "d"}
    several = config.parse({"backends": {"m": urls}}).backends["m"]
    assert [each.url for each in config.servers_of(several)] == ["http://a", "http://b"]
    assert [each.url for each in config.servers_of(backend())] == [backend().url]


@pytest.mark.parametrize(
    ("aliases", "error"),
    [
        ({"a": ["b"]}, 'backends.a.aliases: "b" is a name of backends.b already'),
        ({"a": ["x"], "b": ["x"]}, 'backends.b.aliases: "x" is a name of backends.a already'),
        ({"a": ["a"]}, 'backends.a.aliases: "a" is a name of backends.a already'),
        ({"a": ["x", "x"]}, 'backends.a.aliases: "x" is a name of backends.a already'),
        ({"a": "x"}, "backends.a.aliases: expected a list of texts without control"),
        ({"a": [" x"]}, "backends.a.aliases: expected a list of texts without control"),
        ({"a": [1]}, "backends.a.aliases: expected a list of texts without control"),
    ],
)
def test_a_name_has_one_owner(aliases: dict[str, Any], error: str) -> None:
    backends = {name: BACKEND | {"aliases": aliases.get(name, [])} for name in ("a", "b")}
    with pytest.raises(ConfigError) as caught:
        config.parse({"backends": backends})
    assert str(caught.value).startswith(error)


def test_control_characters_do_not_get_into_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse({"port": "\x1b[2J\n\u202e", "a\nb\u202e": 1})
    assert str(caught.value).splitlines() == [
        'port: expected a whole number, 0 to 65535, got "\\u001b[2J\\n\\u202e"',
        '"a\\nb\\u202e": unknown setting',
    ]
