"""What `ml-federated site` finds before anything is trained, without a server."""

import http.server
import json
import logging
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from known_federation import CONFIG, free_port

from ml_src.cli import federated as command
from ml_src.cli import split
from ml_src.core.data.sample import write_sample
from ml_src.core.federated.kits import ServerKit, read_server_kit, write_kits
from ml_src.core.federated.processes.checks import check_site
from ml_src.core.federated.processes.site import _tell

NAMES = ["cell", "gap", "wall", "core", "rim"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The kit of a site whose training has three classes."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("num_classes: 2", "num_classes: 3"))
    write_kits(config, ["a", "b"], f"127.0.0.1:{free_port()}", tmp_path / "kits")
    return tmp_path / "kits" / "a"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of three classes. Tests must not write into it."""
    data = tmp_path_factory.mktemp("site") / "nuclei"
    write_sample(data, num_images=12, height=64, width=64)
    assert split.main(["--raw_data", str(data / "images"), "--mask_data", str(data / "masks"), "--folds", "3"]) == 0
    return data


def found(site: Path, data_dir: Path) -> dict[str, str | None]:
    return {finding.subject: finding.problem for finding in check_site(site, data_dir)}


def test_sound_data_and_an_unchanged_kit_are_well(site: Path, images: Path) -> None:
    findings = found(site, images)
    assert [findings[subject] for subject in ("configuration", "data", "key", "certificate")] == [None] * 4


def test_a_classes_txt_of_another_number_of_classes_is_found(site: Path, images: Path, tmp_path: Path) -> None:
    data = shutil.copytree(images, tmp_path / "nuclei")
    (data / "classes.txt").write_text("\n".join(NAMES))
    assert found(site, data)["data"] == (f"{data / 'classes.txt'} names 5 classes, but the kit has 3: make them agree")


@pytest.mark.parametrize(
    "section, key, value, named",
    [
        ("federated", "strategy", "fedmedian", "federated"),
        ("model", "base_channels", 8, "model"),
        ("data", "num_classes", 4, "model"),
    ],
)
def test_a_configuration_that_was_changed_is_found_with_its_section(
    site: Path, images: Path, section: str, key: str, value: object, named: str
) -> None:
    change(site / "config.yaml", section, key, value)
    findings = found(site, images)
    assert findings["configuration"] == (
        f"config.yaml has changed since the kit was made, in {named}: put it back, or have new kits made"
    )
    assert "data" not in findings


@pytest.mark.parametrize("section, key, value", [("training", "num_workers", 0), ("data", "data_dir", "own")])
def test_what_a_site_may_choose_for_itself_is_no_change(
    site: Path, images: Path, section: str, key: str, value: object
) -> None:
    change(site / "config.yaml", section, key, value)
    assert found(site, images)["configuration"] is None


def test_a_kit_without_digests_is_as_good_as_before(site: Path, images: Path) -> None:
    contents = yaml.safe_load((site / "site.yaml").read_text())
    del contents["sections"]
    (site / "site.yaml").write_text(yaml.safe_dump(contents))
    change(site / "config.yaml", "model", "base_channels", 8)
    assert found(site, images)["configuration"] is None


def change(config: Path, section: str, key: str, value: object) -> None:
    contents = yaml.safe_load(config.read_text())
    contents.setdefault(section, {})[key] = value
    config.write_text(yaml.safe_dump(contents))


@pytest.mark.parametrize("check", [["--check"], []])
@pytest.mark.parametrize("is_file", [False, True])
def test_a_data_folder_that_is_none_is_named_before_anything_is_started(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], check: list[str], is_file: bool
) -> None:
    folder = tmp_path / "hospitl_a"
    if is_file:
        folder.touch()
    assert command.main(["site", str(site), "--data_dir", str(folder), *check]) == 2
    problem = "is no folder" if is_file else "does not exist"
    said = capsys.readouterr()
    assert f"{folder} {problem}: give --data_dir the folder with images/, masks/ and splits/\n" in said.out + said.err
    assert not (site / "state").exists()


def test_nothing_is_said_of_the_registration_of_a_key_that_is_not_this_sites(site: Path, tmp_path: Path) -> None:
    with answering(read_server_kit(site.parent / "server")):
        assert found(site, tmp_path)["registration"] is None
        (site / "node.key").write_bytes((site.parent / "b" / "node.key").read_bytes())
        foreign = found(site, tmp_path)
        (site / "keys" / "a.pub").unlink()
        missing = found(site, tmp_path)
    assert "is not the key of a" in (foreign["key"] or "")
    assert "has no key of a" in (missing["key"] or "")
    for findings in (foreign, missing):
        assert "registration" not in findings
        assert (findings["server"], findings["clock"]) == (None, None)


class Answer(http.server.BaseHTTPRequestHandler):
    """What a server says that knows every key."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"time": time.time(), "known": True}).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def answering(kit: ServerKit) -> Iterator[None]:
    """Answer at the address of a kit, over TLS with its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit.certificate, kit.key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", kit.port), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_nothing_is_said_of_the_server_where_its_certificate_cannot_be_checked(site: Path, tmp_path: Path) -> None:
    (site / "ca.pem").write_text("nonsense")
    findings = found(site, tmp_path)
    assert "holds no certificate" in (findings["certificate"] or "")
    assert not {"server", "clock", "registration"} & set(findings)


def test_what_the_diary_has_is_logged_without_its_own_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ml_src")
    diary = tmp_path / "rounds.log"
    diary.write_text("2026-11-23 10:50:01 round 0 facts: answered in 1.00 s\n")
    told = _tell(diary, None)
    with diary.open("a") as file:
        file.write("2026-11-23 10:50:09 failed: OSError: one line\nand another of 2026-11-23 10:50:09 \n")
    assert _tell(diary, told) == diary.stat().st_size
    assert caplog.messages == ["failed: OSError: one line", "and another of 2026-11-23 10:50:09 "]
