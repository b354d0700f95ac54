"""Signature of a release: Ed25519 over SHA256SUMS, detached, so that one check covers every file.

The signature is the 64 bytes of RFC 8032 as they are; `openssl pkeyutl -verify -rawin` reads it as well. A key is a PEM file as
`openssl genpkey -algorithm ed25519` writes it. The private key is read and never written anywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from engine.errors import GateRefused, InputError, Unsupported

NAME = "SHA256SUMS.sig"


def private_key(path: str | Path) -> Any:
    """Ed25519 private key of a PEM file without a passphrase.

    Raises:
        InputError: no such key. Unsupported: `cryptography` is not installed.
    """
    return _load(Path(path), "load_pem_private_key", "Ed25519PrivateKey", {"password": None})


def public_key(path: str | Path) -> Any:
    """Ed25519 public key of a PEM file; raises as `private_key` does."""
    return _load(Path(path), "load_pem_public_key", "Ed25519PublicKey", {})


def fingerprint(key: Any) -> str:
    """SHA-256 of the 32 bytes of the public key (of a private key's own one), hex."""
    public = key.public_key() if hasattr(key, "public_key") else key
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def sign(sums: bytes, key: Any) -> bytes:
    """64 bytes for the text of SHA256SUMS."""
    return key.sign(sums)


def check(sums: bytes, signature: bytes, key: Any) -> None:
    """Nothing, where `signature` is that of `sums` under this public key.

    Raises:
        GateRefused: it is not.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, sums)
    except InvalidSignature:
        raise GateRefused("a signature by this key", "another one", NAME, "the right key, or a fresh copy") from None


def _load(path: Path, loader: str, wanted: str, more: dict[str, Any]) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise Unsupported("the package cryptography", "none", "signature", "pip install 'engine[sign]'") from None
    try:
        key = getattr(serialization, loader)(path.read_bytes(), **more)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        # what stands in a file that is no key is not repeated: it may be one of another kind
        raise InputError("a PEM file with an Ed25519 key, no passphrase", "something else", path.name,
                         "openssl genpkey -algorithm ed25519 -out key.pem") from None  # fmt: skip
    if not isinstance(key, getattr(ed25519, wanted)):
        raise InputError("an Ed25519 key", "one of another kind", path.name)
    return key
