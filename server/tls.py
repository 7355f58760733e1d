"""https: the certificate, its key, and both read again."""

from __future__ import annotations

import logging
import ssl

log = logging.getLogger(__name__)


class BadCertificate(Exception):
    """A certificate or key that cannot be served with; the message is one line."""


def context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """TLS 1.2 and newer with this certificate. `keyfile` None: the key is in `certfile`.

    Raises BadCertificate.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    _load(made, certfile, keyfile)
    return made


def reload(made: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    """New connections get the files' present content; if that is no pair, nothing changes but the log."""
    try:
        context(certfile, keyfile)  # a bad pair would leave half of itself in the context
        _load(made, certfile, keyfile)
    except BadCertificate as error:
        log.error("the certificate stays as it was: %s", error)
    else:
        log.info("the certificate was read again")


def _load(made: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    for file in filter(None, (certfile, keyfile)):
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise BadCertificate(f"{file}: {error.strerror or error}") from error
    names = certfile if keyfile is None else f"{certfile} and {keyfile}"
    try:
        made.load_cert_chain(certfile, keyfile, password=_no_password)
    except ssl.SSLError as error:
        why = {"KEY_VALUES_MISMATCH": "the key is not the certificate's"}.get(error.reason or "")
        raise BadCertificate(f"{names}: {why or 'no certificate and private key in PEM'}") from error
    except ValueError as error:  # from `_no_password`
        raise BadCertificate(f"{names}: {error}") from error


def _no_password() -> str:
    raise ValueError("the key is encrypted: decrypt it first (openssl pkey)")
