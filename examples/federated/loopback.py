"""A real federation on one machine: SuperLink, SuperNodes and apps as processes on loopback, over TLS with certificates made
here. For trying out and for tests: between institutions each starts its own (docs/federated.md).
"""

from __future__ import annotations

import ctypes
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

APP = Path(__file__).resolve().parent
BIN = Path(os.environ.get("ENGINE_FLOWER", APP.parents[1] / ".venv-federated")) / "bin"


def certificates(folder: Path) -> Path:
    """ca.pem, server.pem and server.key for 127.0.0.1, valid for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now, keys = datetime.datetime.now(datetime.UTC), [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in ("loopback CA", "localhost")]

    def signed(subject: int, *extensions: tuple[x509.ExtensionType, bool]) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(names[subject]).issuer_name(names[0])
        builder = builder.public_key(keys[subject].public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(keys[0], hashes.SHA256())

    usage = {"digital_signature": True, "content_commitment": False, "key_encipherment": False, "data_encipherment": False,
             "key_agreement": False, "crl_sign": True, "encipher_only": False, "decipher_only": False}  # fmt: skip
    of_ca = x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key())
    authority = signed(
        0, (x509.BasicConstraints(True, None), True), (x509.KeyUsage(key_cert_sign=True, **usage), True), (of_ca, False)
    )
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    by_ca = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
    server = signed(1, (hosts, False), (x509.BasicConstraints(False, None), True), (by_ca, False))
    folder.mkdir()
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(authority.public_bytes(pem))
    (folder / "server.pem").write_bytes(server.public_bytes(pem))
    key = keys[1].private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(key)
    (folder / "server.key").chmod(0o600)
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _die_with_parent() -> None:
    """Whoever started it and is killed leaves no SuperLink behind (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Federation:
    """What runs: processes by name, their logs below `folder`, and how to submit a run."""

    folder: Path
    port: int
    processes: dict[str, subprocess.Popen[bytes]]
    environment: dict[str, str]

    def start(self, name: str, program: str, *arguments: str, **more: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / program), *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=self.folder,
                env={**self.environment, **more}, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def node(self, name: str, config: dict[str, str], **more: str) -> None:
        """A SuperNode with its own files, over TLS."""
        said = " ".join(f'{key}="{value}"' for key, value in {"name": name, **config}.items())
        arguments = [
            "--root-certificates",
            str(self.folder / "tls" / "ca.pem"),
            "--superlink",
            f"127.0.0.1:{self.port}",
        ]
        self.start(name, "flower-supernode", *arguments, "--port", str(free_port()), "--node-config", said, **more)

    def kill(self, name: str) -> None:
        """SIGKILL to a process and its children."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def run(self, app: Path, out: Path, settings: dict[str, object], seconds: float) -> list[dict[str, object]]:
        """Submit a run and wait for its last line; the lines of rounds.jsonl.

        Raises:
            RuntimeError: refused, failed, or no end within `seconds`; with the end of every log.
        """
        said = " ".join(f"{k}={json.dumps(v)}" for k, v in {**settings, "out": str(out)}.items())
        command = [str(BIN / "flwr"), "run", str(app), "test", "--run-config", said]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, cwd=self.folder, timeout=seconds
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            path = out / "rounds.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            if lines and "done" in lines[-1]:
                return lines
            said = (self.folder / "superlink.log").read_text(errors="replace")
            if self.processes["superlink"].poll() is not None or "Traceback" in said:
                raise RuntimeError(self.logs())
            time.sleep(0.5)
        raise RuntimeError(f"no end within {seconds} s\n{self.logs()}")

    def logs(self) -> str:
        """The end of every process' log."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.folder.glob("*.log")
        )


@contextmanager
def federation(folder: Path) -> Iterator[Federation]:
    """A SuperLink over TLS; everything is killed at the end."""
    folder.mkdir()
    tls, port = certificates(folder / "tls"), free_port()
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{tls / "ca.pem"}"\n'
    )
    path = f"{BIN}:{os.environ.get('PATH', '')}"
    environment = {
        **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path, "OMP_NUM_THREADS": "1",
        "HOME": str(home), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    made = Federation(folder, port, {}, environment)
    try:
        made.start(
            "superlink", "flower-superlink", "--disable-runtime-dependency-installation",
            "--ssl-ca-certfile", str(tls / "ca.pem"), "--ssl-certfile", str(tls / "server.pem"),
            "--ssl-keyfile", str(tls / "server.key"), "--host", "127.0.0.1", "--port", str(port),
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if made.processes["superlink"].poll() is not None:
                raise RuntimeError(made.logs())
            time.sleep(0.3)
        yield made
    finally:
        for process in made.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def copy_of_app(folder: Path) -> Path:
    """The app as it is shipped, to be changed or submitted from there."""
    folder.mkdir()
    shutil.copy(APP / "pyproject.toml", folder)
    shutil.copytree(APP / "engine_flower", folder / "engine_flower", ignore=shutil.ignore_patterns("__pycache__"))
    return folder
