"""The client's side of SCRAM (RFC 5802, RFC 7677) as MongoDB speaks it. No I/O.

client                            server
  | -- first:  n,,n=user,r=nonce -->  |
  | <- r=nonce+theirs,s=salt,i=4096 - |
  | -- final:  c=biws,r=...,p=proof ->|
  | <- v=signature ------------------ |     verified here: the server knows the password too
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

from pymongo.saslprep import saslprep

SHA_1 = "SCRAM-SHA-1"
SHA_256 = "SCRAM-SHA-256"

_HASHES = {SHA_1: "sha1", SHA_256: "sha256"}

# RFC 7677 section 4 asks for 4096 at least. The upper bound keeps a salted password under about
# 50 ms of computing in the event loop; MongoDB's defaults are 10,000 and 15,000.
_MIN_ITERATIONS = 4096
_MAX_ITERATIONS = 100_000


class ScramError(Exception):
    """The conversation can't go on; the text holds nothing secret."""


class ScramKey:
    """A user's password, prepared for one mechanism.

    It remembers the last salted password, as RFC 5802 section 5.1 allows, so that reconnecting
    costs nothing. Raises `ScramError` for a password that SASLprep (RFC 4013) prohibits.
    """

    def __init__(self, mechanism: str, username: str, password: str) -> None:
        self.mechanism = mechanism
        self.username = username
        self.hash = _HASHES[mechanism]
        self._password = _prepared(mechanism, username, password)
        self._salted: tuple[bytes, int, bytes] | None = None

    def salted(self, salt: bytes, iterations: int) -> bytes:
        """SaltedPassword of RFC 5802 section 3."""
        if not _MIN_ITERATIONS <= iterations <= _MAX_ITERATIONS:
            raise ScramError(f"the server asks for {iterations} iterations")
        if self._salted is None or self._salted[:2] != (salt, iterations):
            derived = hashlib.pbkdf2_hmac(self.hash, self._password, salt, iterations)
            self._salted = (salt, iterations, derived)
        return self._salted[2]


class ScramConversation:
    """One authentication: `first()`, then `final(answer)`, then `verify(answer)`.

    States: begun, proof sent, verified. Each step raises `ScramError` where the server's message is
    malformed or shows that it is not the one that knows the password.
    """

    def __init__(self, key: ScramKey, nonce: str | None = None) -> None:
        self._key = key
        self._nonce = (nonce or secrets.token_urlsafe(24)).encode()
        name = key.username.replace("=", "=3D").replace(",", "=2C")
        self._first_bare = b"n=" + name.encode() + b",r=" + self._nonce
        self._signature = b""

    def first(self) -> bytes:
        """client-first-message, without channel binding."""
        return b"n,," + self._first_bare

    def final(self, server_first: bytes) -> bytes:
        """client-final-message, the answer to server-first-message."""
        nonce, salt, iterations = self._challenge(server_first)
        without_proof = b"c=biws,r=" + nonce
        message = b",".join((self._first_bare, server_first, without_proof))
        salted = self._key.salted(salt, iterations)
        client_key = self._hmac(salted, b"Client Key")
        stored_key = hashlib.new(self._key.hash, client_key).digest()
        proof = _xor(client_key, self._hmac(stored_key, message))
        self._signature = self._hmac(self._hmac(salted, b"Server Key"), message)
        return without_proof + b",p=" + base64.b64encode(proof)

    def verify(self, server_final: bytes) -> None:
        """Check server-final-message; only after it the server is the right one."""
        try:
            signature = base64.b64decode(_attributes(server_final)[b"v"], validate=True)
        except (KeyError, binascii.Error) as error:
            raise ScramError("the server's last message was not understood") from error
        if not self._signature or not hmac.compare_digest(signature, self._signature):
            raise ScramError("the server's signature is wrong")

    def _challenge(self, server_first: bytes) -> tuple[bytes, bytes, int]:
        try:
            attributes = _attributes(server_first)
            nonce = attributes[b"r"]
            salt = base64.b64decode(attributes[b"s"], validate=True)
            iterations = int(attributes[b"i"])
        except (KeyError, ValueError) as error:
            raise ScramError("the server's first message was not understood") from error
        if not nonce.startswith(self._nonce) or nonce == self._nonce:
            raise ScramError("the server's nonce does not continue ours")
        return nonce, salt, iterations

    def _hmac(self, key: bytes, message: bytes) -> bytes:
        return hmac.digest(key, message, self._key.hash)


def _prepared(mechanism: str, username: str, password: str) -> bytes:
    if mechanism == SHA_1:
        # MongoDB's SCRAM-SHA-1 salts the digest of its first, long gone mechanism MONGODB-CR.
        text = f"{username}:mongo:{password}"
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest().encode()
    try:
        return str(saslprep(password)).encode()
    except ValueError:
        raise ScramError("the password has characters that SASLprep prohibits") from None


def _attributes(message: bytes) -> dict[bytes, bytes]:
    return {part[:1]: part[2:] for part in message.split(b",") if part[1:2] == b"="}


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
