"""Hostile requests, made from a seed: each is one that a server would take, bent in one way or two.

storm = Storm(random.Random(1), good_key="...")
storm.without_key()     no key, a wrong key, or a path that is not served: never forwarded
storm.with_key()        a valid key, and anything else that a client may come up with
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmproxy.endpoints import ENDPOINTS, Body

#: What is in everything that is sent with a wrong key, and must be seen by no backend.
CANARY = "c4n4ry-of-the-keyless"
BOUNDARY = "b0undary"
JSON_PATHS = [path for path, endpoint in ENDPOINTS.items() if endpoint.body is Body.JSON]
AUDIO_PATHS = [path for path, endpoint in ENDPOINTS.items() if endpoint.body is Body.MULTIPART]
CRLF = "\r\n"

FRAMINGS = [
    "Content-Length: 3\r\nContent-Length: 4",
    "Content-Length: 3\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    *(f"Content-Length: {n}" for n in ("+3", "-1", "0x3", "0_3", "3, 3", "", "9" * 400, "3;", "٣")),
    *(
        f"Transfer-Encoding: {coding}"
        for coding in ("xchunked", "chunked, identity", "chunked, chunked", "\x0bchunked", "gzip")
    ),
    "Transfer-Encoding : chunked",
    "Transfer-Encoding:\r\n chunked",
    "Transfer_Encoding: chunked",
]
CHUNKS = [
    *("3\r\nabc\r\n0\r\n\r\n", "0x3\r\nabc\r\n0\r\n\r\n", "-1\r\nabc\r\n", f"{'F' * 17}\r\nabc"),
    *(
        "3 \r\nabc\r\n0\r\n\r\n",
        "3\nabc\n0\n\n",
        "3;\nx\r\nabc\r\n0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
    ),
    *(f"3;{'x' * 9000}\r\nabc\r\n0\r\n\r\n", "0\r\nContent-Length: 9\r\n\r\n", "3\r\nabc\r\n0\r\n"),
    "1\r\nx\r\n" * 3000,
]
FIELDS = [
    *("Host: ", "Host: a/v1", "Host: a b", "Host: a\r\nHost: b", "Host: a?x", "Host: u@h"),
    *("X: \x00", "X: \x1b[31m", "X\x00: y", ": empty", "no colon", " leading: space", "X : y"),
    *("X: a\r\n folded", "X: \x7f", "X: \xff\xfe", "Expect: 100-continue", "Expect: magic"),
    *("Upgrade: h2c\r\nConnection: Upgrade", "Connection: close", "Connection: authorization"),
    *("Content-Encoding: gzip", "Accept-Encoding: br", "TE: trailers", "Cookie: a=b", "X:" * 500),
    *("\r\n".join(f"X-{n}: y" for n in range(200)), "X: " + "y" * 40_000, "Range: bytes=0-"),
    *("X-Request-ID: ../../x\u2028y", "User-Agent: \u202e\r\nevil", "Forwarded: for=1"),
]
KEYS = [
    *(
        "",
        "Bearer",
        "Bearer ",
        "Basic a2V5LTA6",
        "Bearer  key-0",
        "Bearer key-0 x",
        "bearer\tkey-0",
    ),
    *("Bearer ' OR '1'='1", 'Bearer {"$gt":""}', "Bearer %", "Bearer key-0\x00", "Bearer key-\xb2"),
    *(
        "Bearer key-0, Bearer key-1",
        "Bearer \xff",
        "Bearer " + "x" * 9000,
        "Token key-0",
        "Bearer _",
    ),
]
LINES = [
    *("GET  /v1/models HTTP/1.1", "GET /v1/models HTTP/1.2", "GET /v1/models HTTP/2.0", "GET /v1/"),
    *("PRI * HTTP/2.0", "CONNECT a:443 HTTP/1.1", "TRACE / HTTP/1.1", "OPTIONS * HTTP/1.1"),
    *(
        "GET http://169.254.169.254/ HTTP/1.1",
        "G\x00T / HTTP/1.1",
        "GET /\x00 HTTP/1.1",
        "\x16\x03\x01",
    ),
    *("POST /v1/chat/completions#x HTTP/1.1", "get /v1/models http/1.1", "M" * 70 + " / HTTP/1.1"),
    *("GET /" + "a" * 9000 + " HTTP/1.1", "BREW /v1/models HTTP/1.1", " GET / HTTP/1.1", ""),
]
STEPS = [
    *(
        "..",
        ".",
        "%2e%2e",
        "%2f",
        "%252f",
        "",
        "v1",
        "V1",
        "chat",
        "completions",
        "models",
        "audio",
    ),
    *("load_lora_adapter", "sleep", "metrics", "docs", "openapi.json", "tokenize", "%00", "%c0%ae"),
    *(
        ";x",
        "\\",
        "@",
        "a" * 500,
        "%ff",
        "\xe9",
        "embeddings%20",
        "responses",
        "healthz",
        "collective_rpc",
    ),
]
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        2**63,
        10**400,
        1e308,
        "",
        "m",
        "x" * 10_000,
        [],
        {},
        [[]],
        {"": ""},
    ),
    *(
        "\x00",
        "\u2028",
        "\ud800",
        "😀",
        "../m",
        ["m"],
        {"m": "m"},
        "http://169.254.169.254/",
        "true",
    ),
]
NAMES = [
    *("model", "Model", "stream", "stream_options", "STREAM", "messages", "prompt", "input", "n"),
    *("max_tokens", "max_completion_tokens", "best_of", "background", "store", "api_base", "tools"),
    *(
        "",
        "\x00",
        "user",
        "logprobs",
        "echo",
        "extra_body",
        "query",
        "documents",
        "text_1",
        "text_2",
    ),
]
NOISE = [
    *(
        "NaN",
        "-Infinity",
        "1e400",
        "9" * 4301,
        "[" * 3000,
        '{"a":' * 3000,
        "\ufeff{}",
        "{} {}",
        "{",
    ),
    *(
        '{"model":"m","model":"x"}',
        '{"model":"m","mod\\u0065l":"x"}',
        "'m'",
        "",
        "null",
        "\x00",
        "// m",
    ),
    *(
        '{"model":"m",}',
        '{"model":"m"}}',
        '{"model":"\t"}',
        '{"model":"\\ud800"}',
        '{"model":"m"} x',
    ),
]
BYTES = [b"\r\n", b"\n", b"\0", b"\xff", b'"', b"}", b":"]


@dataclass(frozen=True)
class Input:
    """Bytes to send, in these pieces."""

    kind: str
    pieces: tuple[bytes, ...]

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


class Storm:
    """A source of inputs. `good_key` opens; what has no key has `CANARY` in it."""

    def __init__(self, source: random.Random, good_key: str) -> None:
        self._random = source
        self._good = f"Bearer {good_key}"

    def without_key(self) -> Input:
        """Nothing of it may reach a backend."""
        make = self._random.choice(
            [
                *(self._noise, self._keys, self._bent, self._framing, self._heads),
                *(self._lines, self._paths),
            ]
        )
        return self._input(make)

    def with_key(self) -> Input:
        """It may be forwarded, if it makes sense."""
        make = self._random.choice(
            [
                *(self._json, self._json, self._json_noise, self._stream, self._form),
                *(self._pipeline, self._open_heads, self._open_framing),
            ]
        )
        return self._input(make)

    def _input(self, make: Callable[[], bytes]) -> Input:
        data = make()
        cuts = self._random.choice([0, 0, 0, 1, 2])
        edges = sorted({0, *(self._random.randint(0, len(data)) for _ in range(cuts)), len(data)})
        pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
        return Input(make.__name__.strip("_"), tuple(pieces))

    # -- without a key ---------------------------------------------------------------------------

    def _wrong(self) -> str:
        return f"Bearer {CANARY}{self._random.randrange(10**6)}"

    def _noise(self) -> bytes:
        return self._random.randbytes(self._random.randint(1, 2000))

    def _keys(self) -> bytes:
        key = self._random.choice(KEYS)
        fields = [f"Authorization: {key}"] if self._random.random() < 0.8 else [f"x-api-key: {key}"]
        path = self._random.choice(["/v1/chat/completions", f"/v1/embeddings?api_key={CANARY}"])
        return post(path, self._body(CANARY), fields)

    def _bent(self) -> bytes:
        whole = post(self._path(), self._body(CANARY), [f"Authorization: {self._wrong()}"])
        return self._bend(whole)

    def _framing(self) -> bytes:
        return self._framed(self._wrong())

    def _heads(self) -> bytes:
        return self._headed(self._wrong())

    def _lines(self) -> bytes:
        new = f"M{self._random.randrange(10**6)} /v1/{self._random.randrange(10**6)} HTTP/1.1"
        line = self._random.choice([*LINES, *[new] * 10])
        return text(f"{line}{CRLF}Host: p{CRLF}Authorization: {self._good}{CRLF}{CRLF}{CANARY}")

    def _paths(self) -> bytes:
        """A valid key, and a path that is not on the list."""
        while True:
            path = "/" + "/".join(self._some(STEPS, 1, 5))
            if self._random.random() < 0.5:
                path = self._random.choice(["//", "/v1//", "/x/..", "/v1/", "/V1/"]) + path
            if path.partition("?")[0] not in ENDPOINTS:
                return post(path, self._body(CANARY), [f"Authorization: {self._good}"])

    # -- with one --------------------------------------------------------------------------------

    def _json(self) -> bytes:
        body = json.loads(self._body("x"))
        if self._random.random() < 0.2:
            body["model"] = f"m{self._random.randrange(10**6)}"
        for _ in range(self._random.randint(1, 4)):
            body[self._random.choice(NAMES)] = self._random.choice([*ODD, self._tree(4)])
        raw = json.dumps(body, ensure_ascii=self._random.random() < 0.8)
        return self._open(text(raw))

    def _json_noise(self) -> bytes:
        choice = self._random.random()
        if choice < 0.5:
            return self._open(text(self._random.choice(NOISE)))
        if choice < 0.7:
            return self._open(
                self._body("x").decode().encode(self._random.choice(["utf-16", "utf-32"]))
            )
        return self._open(self._bend(self._body("x")))

    def _stream(self) -> bytes:
        options: Any = self._random.choice([*ODD, {"include_usage": self._random.choice(ODD)}])
        body = {"model": "m", "messages": [], "stream": self._random.choice([True, True, *ODD])}
        if self._random.random() < 0.7:
            body["stream_options"] = options
        return self._open(text(json.dumps(body)), path="/v1/chat/completions")

    def _form(self) -> bytes:
        parts = [
            'Content-Disposition: form-data; name="model"\r\n\r\nm',
            'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
            + "\x00RIFF" * 40,
            'Content-Disposition: form-data; name="response_format"\r\n\r\nsrt',
            f'Content-Disposition: form-data; name="{self._random.choice(NAMES)}"\r\n\r\nx',
        ]
        chosen = self._some(parts, 1, 6)
        body = (
            "".join(f"--{BOUNDARY}{CRLF}{part}{CRLF}" for part in chosen) + f"--{BOUNDARY}--{CRLF}"
        )
        data = text(body)
        if self._random.random() < 0.6:
            data = self._bend(data)
        fields = [f"Authorization: {self._good}"]
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return post(self._random.choice(AUDIO_PATHS), data, fields, kind)

    def _pipeline(self) -> bytes:
        some = [self._json, self._bent, self._keys, self._lines, self._stream]
        return b"".join(self._random.choice(some)() for _ in range(self._random.randint(2, 5)))

    def _open_heads(self) -> bytes:
        return self._headed(self._good)

    def _open_framing(self) -> bytes:
        return self._framed(self._good)

    # -- pieces ----------------------------------------------------------------------------------

    def _open(self, body: bytes, path: str | None = None) -> bytes:
        return post(path or self._path(), body, [f"Authorization: {self._good}"])

    def _path(self) -> str:
        return self._random.choice(JSON_PATHS)

    def _body(self, word: str) -> bytes:
        turns = [{"role": "user", "content": word}]
        body = {"model": "m", "messages": turns, "prompt": word, "input": word, "max_tokens": 3}
        return json.dumps(body).encode()

    def _framed(self, key: str) -> bytes:
        framing = self._random.choice([*FRAMINGS, *["Transfer-Encoding: chunked"] * 8])
        head = (
            f"POST {self._path()} HTTP/1.1\r\nHost: p\r\nAuthorization: {key}\r\n{framing}\r\n\r\n"
        )
        return text(head + self._random.choice(CHUNKS) + CANARY)

    def _headed(self, key: str) -> bytes:
        fields = [f"Authorization: {key}", *self._some(FIELDS, 1, 3)]
        self._random.shuffle(fields)
        return post(self._path(), self._body(CANARY), fields)

    def _bend(self, data: bytes) -> bytes:
        """Bytes taken out, put in, doubled or flipped."""
        bent = bytearray(data)
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(bent) + 1)
            match self._random.randrange(4):
                case 0:
                    del bent[at : at + self._random.randint(1, 8)]
                case 1:
                    bent[at:at] = self._random.choice(
                        [b"\r\n", b"\n", b"\0", b"\xff", b'"', b"}", b":"]
                    )
                case 2:
                    bent[at:at] = bent[at : at + self._random.randint(1, 40)]
                case _ if at < len(bent):
                    bent[at] ^= 1 << self._random.randrange(8)
        return bytes(bent)

    def _tree(self, depth: int) -> Any:
        if depth == 0 or self._random.random() < 0.3:
            return self._random.choice(ODD)
        if self._random.random() < 0.5:
            return [self._tree(depth - 1) for _ in range(self._random.randint(0, 3))]
        return {name: self._tree(depth - 1) for name in self._some(NAMES, 0, 3)}

    def _some(self, of: list[str], least: int, most: int) -> list[str]:
        return self._random.choices(of, k=self._random.randint(least, most))


def post(path: str, body: bytes, fields: Iterable[str], kind: str = "application/json") -> bytes:
    """A request; a Host stands in `fields`, or there is one of ours."""
    lines = list(fields)
    if not any(line.startswith("Host:") for line in lines):
        lines.append("Host: p")
    head = [
        f"POST {path} HTTP/1.1",
        *lines,
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
    ]
    return text(CRLF.join([*head, "", ""])) + body


def text(words: str) -> bytes:
    """As UTF-8, lone surrogates too."""
    return words.encode("utf-8", "surrogatepass")


# -- large ones ----------------------------------------------------------------------------------


def large(size: int, key: str) -> Iterator[Input]:
    """Requests of about `size` bytes each, made to cost as much as they can."""
    fields = [f"Authorization: Bearer {key}"]
    for name, body in large_bodies(size):
        yield Input(f"json: {name}", (post("/v1/chat/completions", text(body), fields),))
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    for name, body in large_forms(size):
        yield Input(f"form: {name}", (post(AUDIO_PATHS[0], text(body), fields, kind),))
    for name, rest in large_framings(size):
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: p", *fields, rest]
        yield Input(f"framing: {name}", (text(CRLF.join(lines)),))


def large_bodies(size: int) -> Iterator[tuple[str, str]]:
    """JSON; each is an object with a model."""
    begin = '{"model":"m","messages":[],"x":'
    yield "spaces", filled(begin, " ", "1}", size)
    yield "digits", filled(begin, "9", "1}", size)
    yield "a string", filled(begin + '"', "x", '"}', size)
    yield "a string with one wide character", filled(begin + '"', "x", '😀"}', size)
    yield "escapes", filled(begin + '"', "\\u0041", '"}', size)
    for name, unit in (
        *(("numbers", "1,"), ("fractions", "0.1,"), ("words", '"aa",'), ("objects", "{},")),
        *(("lists", "[],"), ("lists in lists", "[[[[]]]],"), ("pairs", '{"a":1},')),
    ):
        yield name, filled(begin + "[", unit, "1]}", size)
    turns = '{"model":"m","messages":['
    yield "turns", filled(turns, '{"role":"user","content":"x"},', "{}]}", size)
    yield "names", begin + "{" + ",".join(f'"{n:06x}":1' for n in range(size // 11)) + "}}"
    yield "depth", filled(begin, "[", "", size)
    yield "closed depth", begin + "[" * (size // 2) + "]" * (size // 2) + "}"


def large_forms(size: int) -> Iterator[tuple[str, str]]:
    """Of audio."""
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    start, end = f'{part}"model"\r\n\r\nm\r\n', f"\r\n--{BOUNDARY}--\r\n"
    file = start + f'{part}"file"; filename="a"\r\n\r\n'
    yield "a file", filled(file, "\0", end, size)
    yield "almost boundaries", filled(file, f"\r\n--{BOUNDARY[:-1]}", end, size)
    yield "a field", filled(start + f'{part}"prompt"\r\n\r\n', "x", end, size)
    yield "no boundary", filled("", "-", "", size)
    yield "many parts", filled(start, f'{part}"x"\r\n\r\n\r\n', end, size)


def large_framings(size: int) -> Iterator[tuple[str, str]]:
    """The rest of a request, from its framing on."""
    chunked = "Transfer-Encoding: chunked\r\n\r\n"
    yield "chunks of a byte", filled(chunked, "1\r\n \r\n", "0\r\n\r\n", size)
    yield "an extension", filled(chunked + "1;", "x", "\r\n \r\n0\r\n\r\n", size)
    yield "trailers", filled(chunked + "0\r\n", "X: y\r\n", "\r\n", size)
    yield "fields", filled("", "X: y\r\n", "\r\n", size)
    yield "a field", filled("X: ", "y", "\r\n\r\n", size)
    yield (
        "requests",
        filled("Content-Length: 0\r\n\r\n", "GET / HTTP/1.1\r\nHost: p\r\n\r\n", "", size),
    )


def filled(begin: str, unit: str, end: str, size: int) -> str:
    """So many units between that it has about `size` characters."""
    return begin + unit * ((size - len(begin) - len(end)) // len(unit)) + end
