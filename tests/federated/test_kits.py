import datetime
import ssl
import stat
import subprocess

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from known_federation import CONFIG

from ml_src.cli import federated as command
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.federated.facts import sections_of
from ml_src.core.federated.kits import (
    VALIDITY,
    parse_address,
    public_pem,
    read_kit,
    read_server_kit,
    read_site_kit,
    write_kits,
)

SITES = ["hospital_a", "hospital_b"]


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    (folder / "config.yaml").write_text(CONFIG)
    write_kits(folder / "config.yaml", SITES, "federation.example.org:9092", folder / "kits")
    return folder / "kits"


def test_every_kit_holds_what_its_command_needs(kits):
    common = {"README.txt", "ca.pem", "config.yaml", "keys"}
    assert {path.name for path in kits.iterdir()} == {"server", *SITES}
    assert {path.name for path in (kits / "server").iterdir()} == common | {"server.yaml", "server.pem", "server.key"}
    for site in SITES:
        assert {path.name for path in (kits / site).iterdir()} == common | {"site.yaml", "node.key"}
        assert (kits / site / "config.yaml").read_bytes() == (kits / "server" / "config.yaml").read_bytes()


@pytest.mark.parametrize(
    "data, simulated",
    [
        ("{num_classes: 2, fold: 1}", ""),
        ("{data_dir: /home/eve/nuclei, num_classes: 2, splits_dir: /home/eve/splits, fold: 1}", ""),
        ("{num_classes: 2, fold: 1}", "sites: [/home/eve/a, /home/eve/b], "),
    ],
)
def test_no_folder_of_who_makes_kits_is_in_them_and_all_else_is(tmp_path, data, simulated):
    (tmp_path / "config.yaml").write_text(
        f"# of /home/eve\nplugins: [own.py]\ndata: {data}\ntraining: {{trainer_type: federated}}\n"
        f"federated: {{{simulated}rounds: 2}}\n"
    )
    write_kits(tmp_path / "config.yaml", SITES, "host:1", tmp_path / "kits")
    for name in ("server", *SITES):
        text = (tmp_path / "kits" / name / "config.yaml").read_text()
        assert "eve" not in text
        assert yaml.safe_load(text) == {
            "plugins": ["own.py"],
            "data": {"data_dir": "data", "num_classes": 2, "fold": 1},
            "training": {"trainer_type": "federated"},
            "federated": {"rounds": 2},
        }
    kit = read_site_kit(tmp_path / "kits" / "hospital_a")
    assert kit.config(tmp_path / "own").splits_dir == tmp_path / "own" / "splits"


def test_a_kit_knows_the_configuration_that_it_was_made_with(kits):
    kit = read_site_kit(kits / "hospital_a")
    assert kit.sections == sections_of(kit.config())


def test_the_readme_of_a_site_is_a_few_lines_and_says_how_it_ends(kits):
    readme = (kits / "hospital_a" / "README.txt").read_text()
    assert "ends by itself" in readme
    assert "run/weights/best.pt" in readme
    assert len(readme.splitlines()) <= 6
    assert all(len(line) <= 120 for line in readme.splitlines())


@pytest.mark.parametrize(
    "strategy, sites, remedy",
    [
        ("{type: krum, num_malicious: 2}", 3, "needs 7 sites in a round, and there are 3: lower num_malicious, or "),
        ("{type: krum, num_malicious: 2}", 2, "needs 7 sites in a round, and there are 2: "),
        ("{type: krum}", 2, "needs 3 sites in a round, and there are 2: "),
        (
            "{type: multikrum, num_malicious: 1}",
            4,
            "needs 5 sites in a round, and there are 4: lower num_malicious, or ",
        ),
        ("{type: multikrum, num_selected: 4}", 3, "needs 4 sites in a round, and there are 3: lower num_selected, or "),
        ("{type: bulyan, num_malicious: 1}", 6, "needs 7 sites in a round, and there are 6: lower num_malicious, or "),
        ("{type: fedtrimmedavg}", 3, "needs 5 sites in a round, and there are 3: raise beta, or "),
        ("{type: fedtrimmedavg}", 2, "needs 5 sites in a round, and there are 2: "),
        ("{type: fedmedian}", 2, "needs 3 sites in a round, and there are 2: "),
    ],
)
def test_a_strategy_that_needs_more_sites_says_what_helps_with_these(tmp_path, strategy, sites, remedy):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("rounds: 2", f"strategy: {strategy}"))
    with pytest.raises(ConfigError) as raised:
        write_kits(tmp_path / "config.yaml", [f"s{index}" for index in range(sites)], "host:1", tmp_path / "kits")
    kind = yaml.safe_load(strategy)["type"]
    assert str(raised.value) == f"federated.strategy {kind} {remedy}choose another one"


@pytest.mark.parametrize(
    "strategy, said",
    [
        ("krum", "krum: with 3 sites none may be wrong; 5 are needed to bear one"),
        ("bulyan", "bulyan: with 3 sites none may be wrong; 7 are needed to bear one"),
        ("{type: multikrum, num_selected: 3}", "multikrum: with 3 sites none may be wrong; 5 are needed to bear one"),
        ("{type: krum, num_malicious: 0}", None),
        ("fedmedian", None),
    ],
)
def test_init_says_where_the_krum_family_can_bear_no_wrong_site(tmp_path, caplog, strategy, said):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("rounds: 2", f"strategy: {strategy}"))
    words = ["--address", "host:1", "--output", str(tmp_path / "kits"), "--sites", "a", "b", "c"]
    assert command.main(["init", "--config", str(tmp_path / "config.yaml"), *words]) == 0
    assert caplog.messages == ([said] if said else [])


def test_private_keys_are_for_their_owner_only_and_no_two_kits_share_one(kits):
    keys = [kits / "server" / "server.key", *(kits / site / "node.key" for site in SITES)]
    assert [stat.S_IMODE(path.stat().st_mode) for path in keys] == [0o600] * 3
    assert len({path.read_bytes() for path in keys}) == 3
    private = [path for path in kits.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(private) == sorted(keys)


def test_each_site_signs_what_all_others_can_check(kits):
    for site in SITES:
        signature = read_site_kit(kits / site).signing_key().sign(b"words", ec.ECDSA(hashes.SHA384()))
        for other in ("server", *SITES):
            read_kit(kits / other).public_keys[site].verify(signature, b"words", ec.ECDSA(hashes.SHA384()))


def test_node_keys_are_those_that_ssh_keygen_reads(kits):
    for site in SITES:
        command = ["ssh-keygen", "-y", "-P", "", "-f", str(kits / site / "node.key")]
        try:
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            pytest.skip("there is no ssh-keygen")
        assert printed.split()[:2] == (kits / "server" / "keys" / f"{site}.pub").read_text().split()[:2]


def test_the_certificate_is_of_the_authority_for_two_years_and_for_the_names_it_is_reached_by(kits):
    ca = x509.load_pem_x509_certificate((kits / "hospital_a" / "ca.pem").read_bytes())
    certificate = x509.load_pem_x509_certificate((kits / "server" / "server.pem").read_bytes())
    certificate.verify_directly_issued_by(ca)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["federation.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    age = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert VALIDITY - datetime.timedelta(hours=1) < age <= VALIDITY
    key = serialization.load_pem_private_key((kits / "server" / "server.key").read_bytes(), None)
    assert public_pem(key.public_key()) == public_pem(certificate.public_key())


@pytest.mark.parametrize("name, fits", [("federation.example.org", True), ("elsewhere.example.org", False)])
def test_openssl_takes_the_chain_strictly_and_for_its_name_only(kits, name, fits):
    client = ssl.create_default_context(cafile=str(kits / "hospital_a" / "ca.pem"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(kits / "server" / "server.pem", kits / "server" / "server.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]

    def shake():
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue

    if fits:
        shake()
        assert ends[0].version() == "TLSv1.3"
    else:
        with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
            shake()


def test_two_federations_share_nothing(kits, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    write_kits(tmp_path / "config.yaml", SITES, "federation.example.org:9092", tmp_path / "kits")
    for name in ("ca.pem", "keys/hospital_a.pub", "node.key"):
        assert (tmp_path / "kits" / "hospital_a" / name).read_bytes() != (kits / "hospital_a" / name).read_bytes()


@pytest.mark.parametrize(
    "address, listen", [("127.0.0.1:9", "127.0.0.1"), ("localhost:9", "127.0.0.1"), ("192.0.2.1:9", "0.0.0.0")]
)
def test_the_server_listens_to_others_only_where_others_can_reach_it(tmp_path, address, listen):
    (tmp_path / "config.yaml").write_text(CONFIG)
    write_kits(tmp_path / "config.yaml", ["a"], address, tmp_path / "kits")
    kit = read_server_kit(tmp_path / "kits" / "server")
    assert (kit.listen, kit.address) == (listen, address)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:65536", "[::1]:80", "a b:1", "http://a:1"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(address)


@pytest.mark.parametrize("sites", [["a", "A"], ["server"], ["../a"], ["a b"], [""], ["-a"]])
def test_names_that_cannot_be_folders_of_their_own_are_refused_and_nothing_is_written(tmp_path, sites):
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match="site"):
        write_kits(tmp_path / "config.yaml", sites, "host:1", tmp_path / "kits")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "kits").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        write_kits(tmp_path / "config.yaml", SITES, "host:1", tmp_path / "kits")
    assert not list((tmp_path / "kits").iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr("ml_src.core.federated.kits._README", {"server": "all well"})  # so that the first site fails
    with pytest.raises(KeyError):
        write_kits(tmp_path / "config.yaml", SITES, "host:1", tmp_path / "kits")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_training_that_is_not_federated_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {data_dir: DATA, num_classes: 2}\n")
    with pytest.raises(ConfigError, match="trainer_type"):
        write_kits(tmp_path / "config.yaml", SITES, "host:1", tmp_path / "kits")


def test_a_folder_that_does_not_exist_is_said_not_to(tmp_path, capsys):
    assert command.main(["status", str(tmp_path / "hospitl_a")]) == 2
    assert f"{tmp_path / 'hospitl_a'} does not exist: give a folder" in capsys.readouterr().err


def test_a_folder_that_is_no_kit_is_named(tmp_path):
    with pytest.raises(ConfigError, match="ml-federated init"):
        read_kit(tmp_path)


def test_a_damaged_key_is_named(kits, tmp_path):
    for name in ("site.yaml", "config.yaml"):
        (tmp_path / name).write_bytes((kits / "hospital_a" / name).read_bytes())
    (tmp_path / "node.key").write_text("nonsense")
    with pytest.raises(DataError, match=r"node\.key holds no private key"):
        read_site_kit(tmp_path).signing_key()
