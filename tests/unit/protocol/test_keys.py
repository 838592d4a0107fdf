"""Ed25519 keys: standard vectors, weak points, and the suites of others."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import EnvelopeError, Reason
from protocol.keys import PrivateKey, PublicKey, b64url, b64url_decode, fingerprint, is_weak_point, thumbprint
from tests.support.builders import a_key

P = 2**255 - 19
D = (-121665 * pow(121666, -1, P)) % P
L = 2**252 + 27742317777372353535851937790883648493
BASE_Y = 4 * pow(5, -1, P) % P
Point = tuple[int, int]

# RFC 8032 §7.1, tests 1, 2, 3 and "SHA(abc)": seed, public key, message, signature.
RFC8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563f4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "sha512-abc",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
]


def encode(y: int, sign: int) -> bytes:
    """A point as 32 bytes: y with the sign of x on top."""
    return (y | sign << 255).to_bytes(32, "little")


def add(a: Point, b: Point) -> Point:
    """Addition on the twisted Edwards curve -x² + y² = 1 + d·x²·y²."""
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P


def times(n: int, point: Point) -> Point:
    """`point` added up `n` times."""
    total = (0, 1)
    while n:
        if n & 1:
            total = add(total, point)
        point, n = add(point, point), n >> 1
    return total


def x_of(y: int) -> int | None:
    """One x of the points with this y, or None."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    return x if x * x % P == square else None


def small_order_points() -> set[Point]:
    """The torsion: every point of the curve times the order of the big subgroup."""
    found: set[Point] = set()
    y = 2
    while len(found) < 8:
        if (x := x_of(y)) is not None:
            found |= {times(k, times(L, (x, y))) for k in range(8)}
        y += 1
    return found


def suite(name: str) -> object:
    """A suite of test vectors that lives beside the project."""
    root = Path(os.environ.get("RUNNER_VECTORS", Path(__file__).parents[4] / "shared" / "vectors"))
    if not (root / name).exists():
        pytest.skip(f"the vectors {name} are neither in ../shared/vectors nor in $RUNNER_VECTORS")
    return json.loads((root / name).read_text())


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC8032[:3])
def test_rfc_8032_signatures_are_made_and_verified(seed: str, public: str, message: str, signature: str) -> None:
    """Keys and signatures are those of the RFC, to the byte."""
    key = PrivateKey(bytes.fromhex(seed))
    assert key.public.raw.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert key.public.verifies(bytes.fromhex(signature), bytes.fromhex(message))


def test_rfc_8032_signs_a_hash_like_any_message() -> None:
    """The vector "SHA(abc)" of the RFC."""
    seed, _public, _message, signature = RFC8032[3]
    assert PrivateKey(bytes.fromhex(seed)).sign(hashlib.sha512(b"abc").digest()).hex() == signature


def test_the_thumbprint_is_that_of_rfc_8037() -> None:
    """Appendix A.3: the key id is the RFC 7638 thumbprint of the JWK."""
    raw = b64url_decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", 32)
    assert thumbprint(raw) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert fingerprint(raw) == "SHA256:kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert PublicKey(raw).key_id == thumbprint(raw)


def test_the_table_of_weak_points_is_the_torsion_of_the_curve() -> None:
    """All eight points of small order are derived from the curve's equation and refused, with either sign bit."""
    points = small_order_points()
    assert len(points) == 8
    for _x, y in points:
        for sign in (0, 1):
            assert is_weak_point(encode(y, sign))


def test_a_weak_point_is_no_key() -> None:
    """Small order and non-canonical y are refused where keys are loaded."""
    encodings = {encode(y, sign) for _x, y in small_order_points() for sign in (0, 1)}
    encodings |= {encode(P + extra, sign) for extra in range(19) for sign in (0, 1)}
    for encoded in encodings:
        with pytest.raises(EnvelopeError) as refused:
            PublicKey(encoded)
        assert refused.value.reason is Reason.WEAK_KEY


def test_a_weak_r_is_no_signature() -> None:
    """A signer can make R the neutral point, and the library takes it; we do not, nor any other weak or unreduced R."""
    key, message = a_key(), b"message"
    secret = int.from_bytes(hashlib.sha512(key.seed).digest()[:32], "little") & ((1 << 254) - 8) | 1 << 254
    neutral = encode(1, 0)
    challenge = int.from_bytes(hashlib.sha512(neutral + key.public.raw + message).digest(), "little")
    forged = neutral + (challenge * secret % L).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(key.public.raw).verify(forged, message)
    assert not key.public.verifies(forged, message)
    for encoded in [encode(y, 0) for _x, y in small_order_points()] + [encode(P + extra, 0) for extra in range(19)]:
        assert not key.public.verifies(encoded + key.sign(message)[32:], message)


def test_a_y_off_the_curve_verifies_nothing() -> None:
    """Such a key is refused when it is loaded or when it is used."""
    assert x_of(2) is None
    key = a_key()
    assert not accepts({"pub_key": encode(2, 0).hex(), "signature": key.sign(b"").hex(), "message": ""})


@pytest.mark.parametrize("raw", [b"", b"\1" * 31, b"\2" * 33])
def test_a_key_has_32_bytes(raw: bytes) -> None:
    """Other lengths are refused."""
    with pytest.raises(EnvelopeError) as refused:
        PublicKey(raw)
    assert refused.value.reason is Reason.WEAK_KEY


def test_a_signature_has_one_encoding() -> None:
    """S plus the group order is the same number modulo the order, and is refused."""
    key, message = a_key(), b"message"
    signature = key.sign(message)
    s = int.from_bytes(signature[32:], "little")
    assert not key.public.verifies(signature[:32] + (s + L).to_bytes(32, "little"), message)
    assert not key.public.verifies(signature + b"\0", message)
    assert not key.public.verifies(signature[:-1], message)


@pytest.mark.parametrize(
    "text", ["A" * 42, "A" * 44, "A" * 43 + "=", "A" * 42 + "B", "A" * 42 + "+", "é" * 43, "A" * 42 + "\n"]
)
def test_base64url_of_a_key_is_canonical(text: str) -> None:
    """Other lengths, padding, stray bits and other alphabets are refused."""
    with pytest.raises(ValueError, match="base64url"):
        b64url_decode(text, 32)
    with pytest.raises(EnvelopeError):
        PublicKey.from_b64url(text)


def test_a_key_is_equal_by_its_bytes_and_shows_no_secret() -> None:
    """Equality and hash are over the public bytes; the representation of a private key is its id."""
    key = a_key()
    assert PublicKey.from_b64url(key.public.x) == key.public
    assert hash(PublicKey(key.public.raw)) == hash(key.public)
    assert key.public != key.public.raw
    assert b64url(key.seed) not in repr(key)
    assert key.seed.hex() not in repr(key)
    assert key.key_id in repr(key)
    assert key.public.key_id in repr(key.public)


def test_a_seed_has_32_bytes() -> None:
    """Another length is our own mistake."""
    with pytest.raises(ValueError, match="32 bytes"):
        PrivateKey(b"short")


def test_wycheproof_verdicts_are_ours() -> None:
    """Every case of Wycheproof has the verdict that it states."""
    document = suite("wycheproof/ed25519_test.json")
    assert isinstance(document, dict)
    cases = 0
    for group in document["testGroups"]:
        key = PublicKey(bytes.fromhex(group["publicKey"]["pk"]))
        for case in group["tests"]:
            good = key.verifies(bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"]))
            assert good == (case["result"] == "valid"), case["tcId"]
            cases += 1
    assert cases == 151


def test_speccheck_row_is_the_strict_one() -> None:
    """Of the twelve edge cases a strict verifier takes only number 3, a mixed-order pair under cofactorless checking."""
    cases = suite("ed25519-speccheck/cases.json")
    assert isinstance(cases, list)
    assert len(cases) == 12
    assert [n for n, case in enumerate(cases) if accepts(case)] == [3]


def accepts(case: dict[str, str]) -> bool:
    """Whether key and signature are both taken."""
    try:
        key = PublicKey(bytes.fromhex(case["pub_key"]))
    except EnvelopeError:
        return False
    return key.verifies(bytes.fromhex(case["signature"]), bytes.fromhex(case["message"]))
