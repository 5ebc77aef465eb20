"""Tests of what supervisor and workers tell each other: lines, and the configuration in them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from certificates import self_signed

from llmproxy import config
from llmproxy.control import Decoder, config_from_json, config_to_json, encode

PEM = self_signed()
EVERYTHING = """
log_level = "debug"
log_format = "json"
listen = ["tcp:80", "unix:/run/x.sock", "systemd:domain=INET:index=0"]
workers = 3
timeout_connect = 1
drain_deadline = 0
[db]
uri = "mongodb://user:p%40ss@h/db"
[ledger]
path = "j.sqlite"
[admin]
listen = []
[metrics]
enabled = false
[limits]
requests_per_minute = 600
concurrent_requests = 8
tokens_total = 0
cost_per_day = 25_000_000
[prices]
currency = "EUR"
[[prices.models.llama]]
prompt = 150_000
[[prices.models.llama]]
valid_from = 2026-07-01T00:00:00+02:00
prompt = 120_000
completion = 480_000
[backends."org/model-7.1"]
url = "https://gpu1:8000/v1/"
token = "s3"
device = "H100"
model = "other/name"
aliases = ["a", "b c"]
verify_ssl = false
ca_file = "ca.pem"
client_cert_file = "client.pem"
client_key_file = "client.pem"
timeout = 7
usage = "continuous"
on_disconnect = "cancel"
[backends.several]
urls = ["http://a:1/v1", "http://b:2"]
device = "d"
policy = "prefix"
[backends.differing]
device = "d"
queue_size = 3
[[backends.differing.replicas]]
url = "http://a:1/v1"
token = "t"
[[backends.differing.replicas]]
url = "http://b:2"
weight = 3
"""
CERTIFIED = 'host = "::1"\nport = 0\ncert = "c.pem"\nkey = "/k.pem"\n'
TWO_V1 = '[backends.m]\nurl = "http://h/v1/v1"\ndevice = "d"\n'


def test_messages_come_out_as_they_went_in_however_they_are_split():
    sent: list[tuple[str, dict[str, object]]] = [
        ("ready", {"checks": {"keys": "ok"}}),
        ("cut", {}),
        ("failed", {"reason": "a\nb \u2028"}),
    ]
    data = b"".join(encode(kind, **content) for kind, content in sent)
    for size in (1, 2, 7, len(data)):
        decoder = Decoder()
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        got = [message for piece in pieces for message in decoder.feed(piece)]
        assert got == [{"kind": kind, **content} for kind, content in sent]


@pytest.mark.parametrize(
    "text",
    ["", EVERYTHING, CERTIFIED, 'db = {uri = "sqlite:///var/a b.sqlite"}', TWO_V1],
    ids=["defaults", "everything", "certificate", "sqlite", "/v1 twice"],
)
def test_a_configuration_is_handed_over_as_it_is(text):
    settings = config.parse(tomllib.loads(text), Path("/etc/llmproxy"), read_text=lambda path: PEM)
    handed = json.loads(json.dumps(config_to_json(settings)))
    assert config_from_json(handed) == settings


def test_secrets_and_paths_are_handed_over_as_they_were_read():
    mapping = tomllib.loads('[backends.m]\nurl = "http://h"\ndevice = "d"\ntoken_file = "t"')
    settings = config.parse(mapping, Path("/etc"), read_text={Path("/etc/t"): " s3\n"}.__getitem__)
    assert config_from_json(config_to_json(settings)).backends["m"].token == "s3"
