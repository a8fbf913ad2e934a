"""TLS files are checked before anything starts, and what is wrong with them is told by flag and file."""

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from services.common.config import ConfigError
from services.common.tls.files import Tls, TlsError
from services.common.tls.renewal import Renewing
from services.gateway.config import GatewayConfig
from services.scheduler.config import SchedulerConfig
from shoal.fleet.certificates import make_certificates


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_certificates(tmp_path_factory.mktemp("others"))


def a_config(**flags: Any) -> GatewayConfig:
    return GatewayConfig(tokenizers="127.0.0.1:1", **flags)


def all_three(files: Tls) -> dict[str, str]:
    return {"tls_ca": str(files.ca), "tls_certificate": str(files.certificate), "tls_key": str(files.key)}


def test_a_key_that_only_its_owner_may_read_and_no_key_of_the_authority_are_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    made = make_certificates(folder)
    assert made.key is not None
    assert Path(made.key).stat().st_mode & 0o077 == 0
    assert {path.name for path in folder.iterdir()} == {"ca.pem", "service.pem", "service.key"}
    assert sum(b"PRIVATE KEY" in path.read_bytes() for path in folder.iterdir()) == 1


def test_what_was_read_is_not_shown(files: Tls) -> None:
    assert files.key_pem
    assert "PRIVATE" not in repr(files)


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
def test_a_file_that_is_missing_or_no_pem_is_told_by_name(files: Tls, tmp_path: Path, name: str) -> None:
    text, folder = tmp_path / "text", tmp_path / "folder"
    text.write_text("this is no PEM")
    folder.mkdir()
    given: dict[str, Any] = {"ca": files.ca, "certificate": files.certificate, "key": files.key}
    for path, told in ((tmp_path / "nothing", "cannot be read"), (folder, "cannot be read"), (text, "in PEM")):
        with pytest.raises(TlsError, match=rf"^{name} .*{path.name}.*{told}"):
            Tls(**{**given, name: path})


def test_a_key_of_another_certificate_is_told(files: Tls, others: Tls) -> None:
    with pytest.raises(TlsError, match=r"^key .*does not match the certificate"):
        Tls(certificate=files.certificate, key=others.key)


def test_an_encrypted_key_is_told_and_nobody_is_asked_for_its_passphrase(files: Tls, tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(files.key_pem or b"", None)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = tmp_path / "encrypted.key"
    path.write_bytes(key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(TlsError, match="without a passphrase"):
        Tls(certificate=files.certificate, key=path)


def test_a_certificate_and_its_key_belong_together(files: Tls) -> None:
    with pytest.raises(TlsError, match=r"^key is missing"):
        Tls(certificate=files.certificate)
    with pytest.raises(TlsError, match=r"^certificate is missing"):
        Tls(key=files.key)
    assert Tls().ca_pem is None


def test_changed_files_count_once_they_belong_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_certificates(tmp_path)
    renewing = Renewing(first)
    assert renewing.now() is first
    second = make_certificates(tmp_path)
    certificate = second.certificate_pem or b""
    (tmp_path / "service.pem").write_bytes(first.certificate_pem or b"")
    assert renewing.now() is renewing.now() is first
    (tmp_path / "service.pem").unlink()
    assert renewing.now() is first
    told = [record.message for record in caplog.records]
    assert len(told) == 2, "each thing that is wrong is told once"
    (tmp_path / "service.pem").write_bytes(certificate)
    now = renewing.now()
    assert (now.certificate_pem, now.key_pem, now.ca_pem) == (certificate, second.key_pem, second.ca_pem)
    assert renewing.now() is now


def test_files_change_by_a_link_as_kubernetes_does_it(tmp_path: Path) -> None:
    """It writes all into a new folder, and then puts one link in place of another."""
    make_certificates(tmp_path / "1")
    make_certificates(tmp_path / "2")
    (tmp_path / "data").symlink_to("1")
    for name in ("ca.pem", "service.pem", "service.key"):
        (tmp_path / name).symlink_to(f"data/{name}")
    files = Tls(ca=tmp_path / "ca.pem", certificate=tmp_path / "service.pem", key=tmp_path / "service.key")
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").rename(tmp_path / "data")
    assert files.renewed().key_pem == (tmp_path / "2" / "service.key").read_bytes()


def test_tls_between_services_takes_all_of_three_flags(files: Tls, others: Tls) -> None:
    given = all_three(files)
    assert a_config().fleet_tls() is None
    config = a_config(**given)
    tls = config.fleet_tls()
    assert tls
    assert (tls.files.key_pem, tls.require_client_certificate) == (files.key_pem, True)
    assert config.tls_files == tls.files
    for missing in given:
        with pytest.raises(ConfigError, match=f"^--{missing.replace('_', '-')} is missing"):
            a_config(**{**given, missing: ""})
    with pytest.raises(ConfigError, match=r"^--tls-key .*does not match"):
        a_config(**{**given, "tls_key": str(others.key)})
    with pytest.raises(ConfigError, match=r"^--tls-ca is missing"):
        SchedulerConfig(tls_certificate=given["tls_certificate"], tls_key=given["tls_key"])


def test_clients_see_the_fleets_certificate_or_one_of_their_own(files: Tls, others: Tls) -> None:
    pair = {"public_tls_certificate": str(others.certificate), "public_tls_key": str(others.key)}
    assert a_config().public_tls() is None
    assert a_config().client_credentials() is None
    assert a_config().http_context() is None
    for flags, certificate in (
        (all_three(files), files.certificate), (pair, others.certificate), (all_three(files) | pair, others.certificate)
    ):  # fmt: skip
        seen = a_config(**flags).public_tls()
        assert seen is not None
        assert (str(seen.certificate), seen.ca) == (str(certificate), None)
    asking = a_config(**pair, public_tls_client_ca=str(files.ca)).public_tls()
    assert asking
    assert asking.ca_pem == files.ca_pem
    for flags, told in (
        ({"public_tls_key": str(files.key)}, "^--public-tls-certificate is missing"),
        ({"public_tls_client_ca": str(files.ca)}, "--public-tls-certificate is missing"),
        (pair | {"public_tls_client_ca": "/nothing"}, "^--public-tls-client-ca /nothing cannot be read"),
        (pair | {"public_tls_key": str(files.key)}, "^--public-tls-key .*does not match"),
    ):
        with pytest.raises(ConfigError, match=told):
            a_config(**flags)
