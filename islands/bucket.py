"""A log in an object store: S3, GCS, Azure, and what speaks as they do, through obstore.

Retries are the log's: obstore would hide for minutes that the store is away. So its own are few, and every failure is
either one that may pass (Away) or one for which somebody has to do something (StoreError), in a sentence.
"""

import contextlib
import html
import os
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from islands.store import Away, Call, Routine, StoreError, call, redacted

ALLOW_HTTP = "AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP"  # obstore reads these only without options
UNTRUSTED = (
    "its certificate is signed by nobody who is trusted here: give SSL_CERT_FILE the name of a file that has the "
    "certificate of whoever has signed it"
)
REMEDIES = {  # by what is in the text of obstore's errors
    "NoSuchBucket": "create the bucket first",
    "ContainerNotFound": "create the container first",
    "RequestTimeTooSkewed": "the clock of this machine is off: set it",
    "SignatureDoesNotMatch": "the secret does not belong to the key: see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "this key is not known there: see AWS_ACCESS_KEY_ID",
    "failed to authenticate the request": "the key is not that of the account (see AZURE_STORAGE_ACCOUNT_KEY), or the "
    "clock of this machine is off",
    "UnknownIssuer": UNTRUSTED,
    "BadSignature": UNTRUSTED,
    "NotValidForName": "its certificate is that of another host",
    "InvalidCertificate": "its certificate does not hold, or the clock of this machine is off",
    "InvalidContentType": "it does not speak TLS: its endpoint begins with http://",
    "HTTP request to an HTTPS server": "it speaks TLS: its endpoint begins with https://",
    "BadScheme": "an endpoint of http:// needs AWS_ALLOW_HTTP=true, or AZURE_ALLOW_HTTP=true",
    "NotImplemented": "it cannot create an object only if there is none, and without that two writers may both win",
}


class Bucket:
    """url: s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, memory://."""

    def __init__(self, url: str, **client: Any):
        try:
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise StoreError(
                f"{redacted(url)} needs the package obstore: `pip install -r requirements-islands.txt`"
            ) from error
        self.url, self._exceptions = redacted(url), exceptions
        self._failures = (exceptions.BaseError, OSError, ValueError, NotImplementedError)
        retry: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
        plain = any(os.environ.get(name, "").lower() == "true" for name in ALLOW_HTTP)
        options: list[Any] = [  # a time-out is of a whole request, and a payload takes as long as it takes
            {"timeout": f"{seconds}s", "connect_timeout": "5s", "allow_http": plain, **client} for seconds in (10, 900)
        ]
        try:
            if url.startswith("memory://"):
                self._small = self._large = from_url(url)
            else:
                self._small, self._large = (from_url(url, retry_config=retry, client_options=o) for o in options)
        except self._failures as error:
            raise StoreError(f"{self.url}: {_sentence(error)}") from None

    def prepare(self) -> Routine[None]:
        yield from ()  # a bucket needs nothing

    def sweep(self) -> Routine[Sequence[str]]:
        yield from ()
        return []

    def _of(self, key: str) -> Any:
        return self._large if key.startswith("payloads/") else self._small

    def create(self, key: str, data: bytes) -> Routine[bool]:
        with self._said(key, absent="there is no such bucket"):
            try:
                yield call("create", key, self._of(key).put, key, data, mode="create")
            except (self._exceptions.AlreadyExistsError, self._exceptions.PreconditionError):
                return False
        return True

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        return (yield from self._read(key, call("get", key, self._beginning, key, most)))

    def get_range(self, key: str, first: int, count: int) -> Routine[bytes | None]:
        asked = call("get", key, self._of(key).get_range, key, start=first, length=count)
        return (yield from self._read(key, asked))

    def _read(self, key: str, asked: Call) -> Routine[bytes | None]:
        with self._said(key):
            try:
                return bytes((yield asked))
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                    raise
                return None

    def _beginning(self, key: str, most: int) -> Any:
        """A range of an empty object is an error, so what fits is read as a whole."""
        answer = self._of(key).get(key)
        return answer.bytes() if answer.meta["size"] <= most else self._of(key).get_range(key, start=0, length=most)

    def list(self, prefix: str, after: str = "") -> Routine[list[str]]:
        def keys() -> list[str]:
            found = self._small.list(prefix, offset=after or None)  # some stores take no notice of it
            return sorted(entry["path"] for entries in found for entry in entries if entry["path"] > after)

        with self._said(prefix):
            return (yield call("list", prefix, keys))

    def put(self, key: str, data: bytes) -> Routine[None]:
        with self._said(key, absent="there is no such bucket"):
            yield call("put", key, self._small.put, key, data)

    def delete(self, key: str) -> Routine[None]:
        with self._said(key), contextlib.suppress(FileNotFoundError):
            yield call("delete", key, self._small.delete, key)

    def last_modified(self, key: str) -> Routine[float | None]:
        with self._said(key):
            try:
                return (yield call("modified", key, self._small.head, key))["last_modified"].timestamp()
            except FileNotFoundError:
                return None

    @contextlib.contextmanager
    def _said(self, key: str, absent: str = "") -> Iterator[None]:
        """What obstore raises, in a sentence, and without what must stay secret."""
        try:
            yield
        except self._failures as error:
            said = f"{self.url}/{key}: {_sentence(error)}"
            remedy = self._remedy(error) or (absent if isinstance(error, FileNotFoundError) else "")
            raise (StoreError(f"{said}: {remedy}") if remedy else Away(said)) from None

    def _remedy(self, error: Exception) -> str:
        """What somebody has to do; "" for what may pass by itself."""
        for sign, remedy in REMEDIES.items():
            if sign in str(error):
                return remedy
        if isinstance(error, self._exceptions.PermissionDeniedError | self._exceptions.UnauthenticatedError):
            return (
                "this identity may not do it, or the store says so of what is not there to whoever may not list: it "
                "needs to read, list and create there"
            )
        return ""


def _sentence(error: Exception) -> str:
    """What a server has said, or what became of the request."""
    text = str(error)
    if said := re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL):
        return redacted(html.unescape(f"{said[1]} ({said[2]})"))
    for sign, sentence in {"kind: Connect": "no connection", "kind: Timeout": "no answer in time"}.items():
        if sign in text:
            return sentence
    if "169.254.169.254" in text:
        return "no credentials in the environment, and none from the platform"
    return redacted(text.partition("\n\n")[0])
