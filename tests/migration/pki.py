"""Certificates for tests of TLS, made by the `openssl` command as the documentation says."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.phases.commands_objects import TlsCredsX509
from vmm.phases.host import HostFiles
from vmm.phases.tls_objects import open_credentials

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.migration.tls_creds import Endpoint, TlsCredentials

NAME: Final = "there.example"
"""What the server's certificate is for, besides 127.0.0.1."""

_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@final
@attrs.frozen
class Pki:
    """Two authorities, and directories as `tls-creds-x509` wants them."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Pki:
        """Make authorities `ours` and `other`, and a directory of each with certificates for both sides."""
        pki = cls(root)
        for name in ("ours", "other"):
            (root / name).mkdir()
            pki.authority(name)
            pki.certificate(name, "server")
            pki.certificate(name, "client")
        return pki

    def folder(self, name: str = "ours") -> Path:
        """Return the directory of that name."""
        return self.root / name

    def copy(self, folder: Path, *files: str, of: str = "ours") -> Path:
        """Return a directory with the CA of `of` and these files of it."""
        folder.mkdir(exist_ok=True)
        for file in ("ca-cert.pem", *files):
            shutil.copy(self.folder(of) / file, folder / file)
        return folder

    def authority(self, name: str) -> None:
        """Make a CA."""
        folder = self.folder(name)
        _openssl(
            "req", "-x509", *_KEY, "-keyout", f"{folder}/ca-key.pem", "-out", f"{folder}/ca-cert.pem",
            "-days", "3650", "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def certificate(self, authority: str, side: str, *, into: Path | None = None, days: int = 3650) -> None:
        """Make a certificate for `side` and its key, in the directory of the authority, or another."""
        folder, ca = into or self.folder(authority), self.folder(authority)
        extensions = ["-addext", f"extendedKeyUsage={side}Auth"]
        if side == "server":
            extensions += ["-addext", f"subjectAltName=DNS:{NAME},IP:127.0.0.1"]
        request = _openssl(
            "req", "-new", *_KEY, "-keyout", f"{folder}/{side}-key.pem", "-subj", f"/CN={side}", *extensions
        )
        _openssl(
            "x509", "-req", "-CA", f"{ca}/ca-cert.pem", "-CAkey", f"{ca}/ca-key.pem", "-days", str(days),
            "-copy_extensions", "copyall", "-out", f"{folder}/{side}-cert.pem", given=request,
        )  # fmt: skip

    def revoke(self, folder: Path, side: str) -> None:
        """Put a list into `folder` in which the certificate of `side` is revoked."""
        ca = self.folder("ours")
        (folder / "index").touch()
        (folder / "number").write_text("01")
        (folder / "config").write_text(
            f"[ca]\ndefault_ca=it\n[it]\ndatabase={folder}/index\ncrlnumber={folder}/number\ndefault_md=sha256\n"
            "default_crl_days=3650\n"
        )
        command = ("ca", "-config", f"{folder}/config", "-cert", f"{ca}/ca-cert.pem", "-keyfile", f"{ca}/ca-key.pem")
        _openssl(*command, "-revoke", f"{ca}/{side}-cert.pem")
        _openssl(*command, "-gencrl", "-out", f"{folder}/ca-crl.pem")


def _openssl(*args: str, given: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *args], check=True, capture_output=True, input=given).stdout


def creds(folder: Path, endpoint: Endpoint, **options: Any) -> TlsCredentials:
    """Open an object's files."""
    args = TlsCredsX509(qom_type="tls-creds-x509", id="tls0", dir=str(folder), endpoint=endpoint, **options)
    return open_credentials(HostFiles(), args)  # type: ignore[arg-type]
