"""Join strings and the statements of enrolment."""

import pytest

from protocol import strict_json
from protocol.identity import Certificate, EnrollClaims, HelloClaims, JoinString, join_token, runner_url
from tests.support.builders import a_certificate, a_root, an_enrolment, hello_claims

TOKEN = join_token(bytes(range(16)))
ROOT = a_root().fingerprint
JOIN = f"rj1://127.0.0.1:8443/{TOKEN}#{ROOT}"


def test_a_join_string_says_where_what_and_whom_to_trust() -> None:
    """All parts come back, and the text too."""
    join = JoinString.parse(JOIN)
    assert (join.host, join.port, join.token, join.root, join.secure) == ("127.0.0.1", 8443, TOKEN, ROOT, False)
    assert str(join) == JOIN
    assert join.url == "ws://127.0.0.1:8443/v1/runner"


def test_a_join_string_says_whether_the_way_is_encrypted() -> None:
    """`rj1s` is TLS; names, and addresses of both families."""
    for host in ("plane.example.test", "[::1]", "10.0.0.1"):
        text = f"rj1s://{host}:443/{TOKEN}#{ROOT}"
        assert JoinString.parse(f"  {text}\n").url == f"wss://{host}:443/v1/runner"
        assert str(JoinString.parse(text)) == text
    assert runner_url("h", 1, secure=False) == "ws://h:1/v1/runner"


@pytest.mark.parametrize(
    "text",
    [
        "",
        JOIN.replace("rj1", "rj2"),
        JOIN.replace("8443", "0"),
        JOIN.replace("8443", "65536"),
        JOIN.replace("8443", "999999"),
        JOIN.replace("8443", "٣"),
        JOIN.replace(TOKEN, TOKEN[:-1]),
        JOIN.replace(TOKEN, TOKEN[:-1] + "B"),
        JOIN.replace("#SHA256:", "#"),
        JOIN[:-1],
        JOIN + "x",
        JOIN.replace("127.0.0.1", "a b"),
        JOIN.replace("127.0.0.1", "user@host"),
        JOIN.replace("127.0.0.1", "::1"),
        JOIN + " " + JOIN,
    ],
)
def test_what_is_no_join_string_is_refused_without_repeating_it(text: str) -> None:
    """It holds a secret, so the error does not."""
    with pytest.raises(ValueError, match=r".") as refused:
        JoinString.parse(text)
    assert TOKEN[:20] not in str(refused.value)


def test_a_join_token_wants_16_bytes() -> None:
    """Other entropy is our own mistake."""
    assert len(TOKEN) == 22
    with pytest.raises(ValueError, match="16 bytes"):
        join_token(b"short")


def test_statements_survive_their_bytes_and_may_grow() -> None:
    """Unknown fields of hello, certificate and enrolment are ignored."""
    for model, value in ((HelloClaims, hello_claims()), (Certificate, a_certificate()), (EnrollClaims, an_enrolment())):
        fields = value.model_dump(mode="json") | {"new": [1]}
        assert model.parse(strict_json.dumps(fields)) == value


def test_labels_are_bounded() -> None:
    """At most 32, each short."""
    for labels in ({str(n): "x" for n in range(33)}, {"a": "x" * 201}):
        with pytest.raises(ValueError, match="labels"):
            an_enrolment(labels=labels)
