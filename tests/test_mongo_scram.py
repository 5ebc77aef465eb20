"""SCRAM against the published conversations, and against servers that cheat."""

from __future__ import annotations

import pytest

from llmproxy.storage.scram import SHA_1, SHA_256, ScramConversation, ScramError, ScramKey

# RFC 7677 section 3.
NONCE = "rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
SALT = "W22ZaJ0SNY7soEsUEjb6gQ=="
SERVER_FIRST = f"r={SERVER_NONCE},s={SALT},i=4096".encode()
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def conversation(password: str = "pencil", username: str = "user") -> ScramConversation:
    return ScramConversation(ScramKey(SHA_256, username, password), NONCE)


def test_sha_256_speaks_as_the_rfc_shows() -> None:
    talk = conversation()
    assert talk.first() == b"n,,n=user,r=" + NONCE.encode()
    assert talk.final(SERVER_FIRST) == (
        b"c=biws,r=" + SERVER_NONCE.encode() + b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    talk.verify(SERVER_FINAL)


def test_sha_1_speaks_as_the_drivers_specification_shows() -> None:
    # MongoDB's "Driver Authentication" specification, SCRAM-SHA-1.
    nonce = "fyko+d2lbbFgONRv9qkxdawL"
    server_nonce = f"{nonce}Ho+Vgk7qvUOKUwuWLIWg4l/9SraGMHEE".encode()
    talk = ScramConversation(ScramKey(SHA_1, "user", "pencil"), nonce)
    proof = talk.final(b"r=" + server_nonce + b",s=rQ9ZY3MntBeuP3E1TDVC4w==,i=10000")
    assert proof == b"c=biws,r=" + server_nonce + b",p=MC2T8BvbmWRckDw8oWl5IVghwCY="
    talk.verify(b"v=UMWeI25JD1yNYZRMpZ4VHvhZ9e0=")


@pytest.mark.parametrize(
    "challenge",
    [
        b"",
        b"e=other-error",
        b"r=somebodyelse,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
        f"r={NONCE},s={SALT},i=4096".encode(),  # adds nothing of its own
        f"r={SERVER_NONCE},s=W22,i=4096".encode(),
        f"r={SERVER_NONCE},s={SALT},i=many".encode(),
        f"r={SERVER_NONCE},s={SALT},i=1".encode(),  # cheap to guess from
        f"r={SERVER_NONCE},s={SALT},i=1000000000".encode(),  # stands still for minutes
    ],
)
def test_a_challenge_that_is_wrong_is_not_answered(challenge: bytes) -> None:
    with pytest.raises(ScramError):
        conversation().final(challenge)


@pytest.mark.parametrize("final", [b"", b"v=", b"v=AAAA", b"v=!", b"e=invalid-proof"])
def test_a_server_that_does_not_know_the_password_is_refused(final: bytes) -> None:
    talk = conversation()
    talk.final(SERVER_FIRST)
    with pytest.raises(ScramError):
        talk.verify(final)


def test_nothing_is_verified_before_a_proof_was_sent() -> None:
    with pytest.raises(ScramError):
        conversation().verify(b"v=")


def test_names_are_escaped() -> None:
    assert conversation(username="a=b,c").first() == b"n,,n=a=3Db=2Cc,r=" + NONCE.encode()


def test_equivalent_passwords_are_the_same() -> None:
    # RFC 4013: the soft hyphen maps to nothing, and the Roman numeral IX to its letters.
    assert conversation("I\u00adX").final(SERVER_FIRST) == conversation("\u2168").final(
        SERVER_FIRST
    )


def test_a_prohibited_password_is_an_error_that_does_not_show_it() -> None:
    with pytest.raises(ScramError) as caught:
        ScramKey(SHA_256, "user", "bell\u0007")
    assert "bell" not in str(caught.value)


def test_each_conversation_has_a_nonce_of_its_own() -> None:
    key = ScramKey(SHA_256, "user", "pencil")
    assert ScramConversation(key).first() != ScramConversation(key).first()


def test_the_salted_password_is_computed_once_for_a_salt() -> None:
    key = ScramKey(SHA_256, "user", "pencil")
    assert key.salted(b"salt", 4096) is key.salted(b"salt", 4096)
    assert key.salted(b"other", 4096) != key.salted(b"salt", 4096)
    assert key.salted(b"salt", 4097) != key.salted(b"salt", 4096)
