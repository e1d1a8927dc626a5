"""A federation of real processes on this machine: a server and two sites with an instant answer."""

import asyncio
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import sys
import time
from base64 import b64encode
from pathlib import Path

import known_federation
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from known_federation import alive, descendants, ends_of_sockets, order, running, start, wait_for
from known_sites import differing, history, weights
from test_federation import NAMES, begun, deployed, named_in, whole

from ml_src.cli import federated as command
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.federated.kits import public_pem, read_server_kit, read_site_kit
from ml_src.core.federated.processes.checks import check_site, require_welcome
from ml_src.core.federated.processes.hello import Hello, RefusedError, UnreachableError, say_hello
from ml_src.core.federated.processes.server import serve
from ml_src.core.federated.processes.status import status
from ml_src.core.federated.processes.superlink import FLEET, HELLO, TOKEN_HEADER, Gate
from ml_src.core.federated.processes.supernode import FIRST_NAP, LOCAL_NAP, LONGEST_NAP, Naps
from ml_src.core.federated.processes.tuning import log_to

pytestmark = pytest.mark.xdist_group("processes")
TOKEN = "a1" * 32
KEY = b"-----BEGIN PUBLIC KEY-----\n"
MAX_BYTES = 1000
START_RUN = "/v1/control/start-run"


# The gate, without a network


async def echo(scope, receive, send):
    """An application that reads all of a request and sends it back."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def through_gate(path, client, headers=(), chunks=(b"",)):
    """Return the status, the body, and how many chunks were read."""
    sent, left = [], list(chunks)

    async def receive():
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "client": client, "query_string": b"", "headers": list(headers)}
    asyncio.run(Gate(echo, TOKEN, frozenset({KEY}), MAX_BYTES)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], sent[1]["body"], len(chunks) - len(left)


KNOWS_TOKEN = (TOKEN_HEADER.encode(), TOKEN.encode())
REGISTERED = (b"flwr-public-key", b64encode(KEY))
FORWARDED = (b"x-forwarded-for", b"127.0.0.1")


@pytest.mark.parametrize("path", [START_RUN, "/v1/runtime/acquire-task", "/docs", "/", "/v1/fleet", "//v1/control/x"])
@pytest.mark.parametrize("client", [("10.0.0.5", 50000), ("::ffff:10.0.0.5", 50000), ("fe80::1", 1), None, ("", 1)])
def test_other_machines_reach_nothing_but_the_fleet_whatever_they_know_or_claim(path, client):
    answer = through_gate(path, client, [KNOWS_TOKEN, FORWARDED, REGISTERED])
    assert answer[0] == 403
    assert b"own machine" in answer[1]


@pytest.mark.parametrize(
    "headers", [[], [(TOKEN_HEADER.encode(), b"")], [(TOKEN_HEADER.encode(), b"a1")], [REGISTERED]]
)
def test_on_this_machine_the_token_is_needed(headers):
    assert through_gate(START_RUN, ("127.0.0.1", 1), headers)[0] == 403


def test_the_servers_own_command_passes_with_bodies_of_any_size():
    chunks = [b"x" * MAX_BYTES] * 3
    assert through_gate(START_RUN, ("127.0.0.1", 1), [KNOWS_TOKEN], chunks) == (200, b"".join(chunks), 3)


@pytest.mark.parametrize("header", [b"", b"?", b64encode(KEY + b"x"), b64encode(b"")])
def test_nothing_is_read_of_a_request_without_a_registered_key(header):
    status, body, read = through_gate(FLEET + "x", ("10.0.0.5", 1), [(b"flwr-public-key", header)], [b"x"])
    assert (status, read) == (401, 0)
    assert b"not registered" in body


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 10**30, "-1", "1e3", "many"])
def test_nothing_is_read_of_a_request_that_says_it_is_too_large(length):
    headers = [REGISTERED, (b"content-length", str(length).encode())]
    assert through_gate(FLEET + "x", ("10.0.0.5", 1), headers, [b"x"])[::2] == (413, 0)


def test_a_request_that_does_not_say_its_size_is_read_up_to_the_bound():
    chunk = b"x" * (MAX_BYTES // 2)
    assert through_gate(FLEET + "x", ("10.0.0.5", 1), [REGISTERED], [chunk] * 2) == (200, chunk * 2, 2)
    assert through_gate(FLEET + "x", ("10.0.0.5", 1), [REGISTERED], [chunk] * 100)[::2] == (413, 3)


def test_naps_grow_while_nothing_comes_and_begin_anew_with_work():
    naps = Naps()
    idle = [naps.length(3.0) for _ in range(100)]
    assert idle == sorted(idle)
    assert (idle[0], idle[-1]) == (FIRST_NAP, LONGEST_NAP)
    assert [naps.length(0.5), naps.length(3.0)] == [LOCAL_NAP, FIRST_NAP]


def test_the_inside_of_flower_that_is_followed_is_still_there():
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supercore.retry import http_retry
    from flwr.superlink.grid import HttpGrid
    from flwr.supernode import start_client_internal
    from ml_src.core.federated.processes import runtime, tuning

    assert runtime.fetch_soon is tuning.fetch_soon
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        assert function.__kwdefaults__["initial_backoff"] == tuning.FIRST_WAIT
    assert start_client_internal.time.sleep
    assert http_retry.MAX_RETRY_DELAY > tuning.LONGEST_RETRY
    grid = HttpGrid("127.0.0.1:1", True, token="x")
    assert grid._client is None
    assert grid._retry_invoker.max_tries is None


# Real processes


class Federation:
    def __init__(self, folder: Path) -> None:
        self.kits = known_federation.kits(folder, ["a", "b"])
        self.data = folder / "data"
        self.data.mkdir()
        self.kit = read_server_kit(self.kits / "server")
        self.server = start("server", str(self.kits / "server"))
        self.sites = {name: start("site", str(self.kits / name), str(self.data)) for name in ("a", "b")}

    @property
    def processes(self):
        return [self.server, *self.sites.values()]

    def round(self, name, sites=("a", "b"), floats=1000, group=None):
        """Let the server ask sites; returns what each answered."""
        came = order(self.kits / "server", name, {"sites": list(sites), "group": group or name, "floats": floats})
        wait_for(f"the answers of {name}", came.exists, *self.processes)
        return json.loads(came.read_text())["sites"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    federation = Federation(tmp_path_factory.mktemp("federation"))
    try:
        yield federation
    finally:
        with running(*federation.processes):
            pass


def request(kit, method, path, headers, body=b""):
    """Ask the running server of a kit over TLS; returns the status and the answer."""
    connection = http.client.HTTPSConnection(
        "127.0.0.1", kit.port, timeout=10, context=ssl.create_default_context(cafile=str(kit.ca))
    )
    try:
        connection.putrequest(method, path)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_sites_answer_round_after_round_whatever_the_size(federation):
    assert federation.round("1") == {"a": 1.0, "b": 1.0}
    assert federation.round("2", floats=3_000_000) == {"a": 1.0, "b": 1.0}  # in three pieces
    assert federation.round("3", sites=["b"]) == {"b": 1.0}
    assert re.search(r"round 3 train: answered in \d", (federation.kits / "b" / "state" / "rounds.log").read_text())
    assert "round 3" not in (federation.kits / "a" / "state" / "rounds.log").read_text()


def test_a_site_that_fails_says_so_without_naming_its_files_and_answers_the_next_message(federation):
    failed = federation.round("4", group="impossible")
    assert failed == dict.fromkeys(["a", "b"], "the site failed, and its log says why (ValueError)")
    assert "patient_17.png" in (federation.kits / "a" / "state" / "worker.log").read_text()
    assert federation.round("5") == {"a": 1.0, "b": 1.0}


def test_all_sockets_of_all_processes_are_on_this_machine(federation):
    federation.round("6")
    ends = set()
    for process in federation.processes:
        for pid in {process.pid} | descendants(process.pid):
            ends |= ends_of_sockets(pid)
    assert ends == {"0100007F", "00000000"}  # 127.0.0.1; the other end of a socket that listens
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f"{federation.kit.port:04X}"
    assert [words[1] for words in listening if words[3] == "0A" and words[1].endswith(":" + port)] == [
        f"0100007F:{port}"
    ]


def test_the_control_api_is_closed_to_who_does_not_know_the_token(federation):
    federation.round("7")
    status, body = request(federation.kit, "POST", START_RUN, {"content-type": "application/x-protobuf"})
    assert status == 403
    assert "token" in body
    known = {TOKEN_HEADER: federation.kit.token.read_text()}
    assert request(federation.kit, "POST", "/v1/control/list-nodes", known)[0] != 403


def test_an_oversized_request_is_refused_by_the_running_server(federation):
    federation.round("8")
    headers = {"flwr-public-key": b64encode(public_pem(federation.kit.public_keys["a"])).decode()}
    status, body = request(federation.kit, "POST", FLEET + "push-object", headers | {"content-length": str(2**40)})
    assert status == 413
    assert "a request may have" in body


def test_an_unregistered_key_is_refused_by_the_running_server_and_by_the_site_itself(federation, tmp_path):
    federation.round("9")
    stranger = shutil.copytree(federation.kits / "a", tmp_path / "a", ignore=shutil.ignore_patterns("state"))
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (stranger / "keys" / "a.pub").write_bytes(key.public_key().public_bytes(*openssh))
    (stranger / "node.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    headers = {"flwr-public-key": b64encode(public_pem(key.public_key())).decode()}
    status, body = request(federation.kit, "POST", FLEET + "activate-node", headers)
    assert status == 401
    assert "not registered" in body
    findings = {finding.subject: finding.problem for finding in check_site(stranger, federation.data)}
    assert findings["registration"] == (
        f"the server {federation.kit.address} does not know the key of a: "
        "ask who runs it whether this kit is an old one"
    )
    site = start("site", str(stranger), str(federation.data))
    said = site.communicate(timeout=60)[0].decode()
    assert site.returncode == 2
    assert "does not know the key of a" in said


def test_a_known_key_without_its_signature_is_refused(federation):
    federation.round("10")
    from flwr.proto.fleet_pb2 import ActivateNodeRequest

    key = public_pem(federation.kit.public_keys["a"])
    body = ActivateNodeRequest(public_key=key, heartbeat_interval=30).SerializeToString()
    headers = {"flwr-public-key": b64encode(key).decode(), "content-type": "application/protobuf"}
    assert request(federation.kit, "POST", FLEET + "activate-node", headers, body)[0] == 401


def test_a_server_of_another_federation_is_refused_with_a_sentence(federation, tmp_path):
    federation.round("11")
    (tmp_path / "other").mkdir()
    others = known_federation.kits(tmp_path / "other", ["a"])
    wrong = shutil.copytree(others / "a", tmp_path / "a")
    (wrong / "site.yaml").write_bytes((federation.kits / "a" / "site.yaml").read_bytes())
    with pytest.raises(RefusedError, match="is not the one of this kit"):
        say_hello(read_site_kit(wrong), "a")


def test_a_client_without_tls_gets_nothing(federation):
    federation.round("12")
    with socket.create_connection(("127.0.0.1", federation.kit.port), timeout=10) as plain:
        plain.sendall(f"GET {HELLO} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        try:
            assert b"HTTP/1.1" not in plain.recv(1000)
        except ConnectionResetError:
            return


def test_status_says_who_is_connected_and_what_was_done_last(federation):
    federation.round("13")
    said = "\n".join(status(federation.kits / "server"))
    assert f"server of {federation.kit.address}: running" in said
    assert "site a: connected\nsite b: connected" in said
    said = "\n".join(status(federation.kits / "a"))
    assert "site a: running" in said
    assert f"the server {federation.kit.address} answers\n" in said
    assert "round 13 train: answered" in said


def test_a_check_finds_all_well_but_the_empty_data_folder(federation, capsys):
    federation.round("14")
    assert command.main(["site", str(federation.kits / "a"), "--data_dir", str(federation.data), "--check"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("data: ")] == [
        f"{subject}: ok" for subject in ("configuration", "key", "certificate", "server", "clock", "registration")
    ]


def test_a_kit_has_one_server_at_a_time(federation):
    federation.round("15")
    with pytest.raises(ConfigError, match="another process"):
        serve(federation.kits / "server")


def child(process, module):
    """Return the number of the child that runs one of our modules."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(process.pid)}
    return next(pid for pid, words in commands.items() if f"processes.{module}" in words)


def kill(process):
    """End a process without warning, and wait until all that it has started has ended too."""
    left = descendants(process.pid)
    assert left
    process.kill()
    wait_for("the end of its processes", lambda: not alive(left))


def test_a_site_that_is_killed_at_work_leaves_no_process_comes_back_and_its_message_is_known_to_be_lost(federation):
    federation.round("16")
    came = order(federation.kits / "server", "17", {"sites": ["b"], "group": "slow", "floats": 1})
    wait_for("work", (federation.data / "working").exists, *federation.processes)
    kill(federation.sites["b"])
    federation.sites["b"] = start("site", str(federation.kits / "b"), str(federation.data))
    wait_for("the outcome", came.exists, *federation.processes)
    assert json.loads(came.read_text())["sites"] == {"b": "lost"}
    assert federation.round("18") == {"a": 1.0, "b": 1.0}


def test_a_connection_that_ends_during_the_work_is_made_anew_and_the_worker_goes_on(federation):
    (federation.data / "working").unlink(missing_ok=True)
    came = order(federation.kits / "server", "18b", {"sites": ["b"], "group": "slow", "floats": 1})
    wait_for("work", (federation.data / "working").exists, *federation.processes)
    os.kill(child(federation.sites["b"], "supernode"), signal.SIGKILL)
    (federation.data / "release").touch()
    wait_for("the outcome", came.exists, *federation.processes)
    assert json.loads(came.read_text())["sites"] == {"b": "lost"}
    assert federation.round("18c") == {"a": 1.0, "b": 1.0}
    diary = (federation.kits / "b" / "state" / "rounds.log").read_text()
    assert "not delivered: the connection to the server began anew" in diary
    (federation.data / "release").unlink(missing_ok=True)


def test_a_server_that_is_killed_leaves_no_process_and_running_sites_find_the_next_one(federation):
    (federation.data / "working").unlink(missing_ok=True)
    forgotten = order(federation.kits / "server", "19", {"sites": ["a"], "group": "slow", "floats": 1})
    wait_for("work", (federation.data / "working").exists, *federation.processes)
    kill(federation.server)
    forgotten.with_suffix(".json").unlink()
    federation.server = start("server", str(federation.kits / "server"))
    assert federation.round("20", sites=["b"]) == {"b": 1.0}
    (federation.data / "release").touch()  # what a has worked on is of no use any more
    assert federation.round("21") == {"a": 1.0, "b": 1.0}
    assert all(site.poll() is None for site in federation.sites.values())


def test_a_server_whose_superlink_dies_ends_with_a_sentence_and_goes_on_when_started_again(federation):
    federation.round("22")
    for pid in descendants(federation.server.pid):
        os.kill(pid, signal.SIGKILL)
    said = federation.server.communicate(timeout=60)[0].decode()
    assert federation.server.returncode == 2
    assert "SuperLink has ended" in said
    federation.server = start("server", str(federation.kits / "server"))
    assert federation.round("23") == {"a": 1.0, "b": 1.0}


def test_all_end_cleanly_when_asked_and_by_themselves_when_all_is_over(federation, caplog):
    federation.round("24")
    left = set().union(*(descendants(process.pid) for process in federation.processes))
    assert federation.round("over", sites=["b"]) == {"b": 1.0}
    order(federation.kits / "server", "over2", "end")
    assert federation.server.wait(60) == 0
    site = federation.sites["b"]
    assert site.wait(60) == 0
    weights = federation.kits / "b" / "run" / "weights" / "best.pt"
    sentence = f"the federation has ended after 30 rounds (best: round 27); the network is {weights}"
    assert site.communicate()[0].decode().splitlines()[-1] == sentence
    federation.sites["a"].send_signal(signal.SIGINT)
    assert federation.sites["a"].wait(60) == 130
    said = federation.sites["a"].communicate()[0].decode().splitlines()
    assert said[-1] == "stopped"
    assert "Traceback" not in said
    assert not alive(left)
    caplog.clear()
    assert command.main(["site", str(federation.kits / "b"), "--data_dir", "nowhere"]) == 0  # there is no server
    assert [record.getMessage() for record in caplog.records] == [sentence]
    assert sentence in list(status(federation.kits / "b"))
    with pytest.raises(UnreachableError, match="may not be started"):
        say_hello(federation.kit)
    assert f"server of {federation.kit.address}: not running" in list(status(federation.kits / "server"))


def test_what_flower_says_goes_into_a_file_and_nowhere_else(tmp_path, monkeypatch, capfd):
    flower = logging.getLogger("flwr")
    monkeypatch.setattr(flower, "handlers", flower.handlers)
    monkeypatch.setattr(flower, "propagate", flower.propagate)
    log_to(tmp_path / "said.log")
    flower.warning("Connection attempt failed")
    assert "Connection attempt failed" in (tmp_path / "said.log").read_text()
    assert capfd.readouterr() == ("", "")


# Whole trainings over three sites, in minutes


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The data folder of each site. Tests must not write into it."""
    return known_federation.write_data(tmp_path_factory.mktemp("sites"), NAMES)


@whole
def test_a_site_that_was_away_at_the_end_is_told_by_the_server_that_is_started_again(images, tmp_path):
    with deployed(images, tmp_path, federated={"rounds": 3, "min_sites": 2, "round_timeout": 20}) as deployment:
        begun(deployment, charite="hold")
        deployment.wait_for("round 2", (deployment.kits / "charite" / "working").exists)
        deployment.kill("charite")
        assert "charite: not told of the end" in deployment.end()
        assert [deployment.processes[name].wait(60) for name in NAMES[:2]] == [0, 0]
        deployment.start("charite")
        diary = deployment.kits / "charite" / "state" / "site.log"
        charite = deployment.processes["charite"]
        wait_for("its search", lambda: diary.read_text().endswith("trying again until it does\n"), charite)
        deployment.start("server")
        said = deployment.end()
        assert deployment.processes["charite"].wait(60) == 0
        deployment.start("server")  # nobody is there any more
        assert "told of the end" not in deployment.end()
    assert "charite: told of the end" in said
    for name in NAMES:
        assert not differing(weights(deployment.run, "best.pt"), weights(deployment.kits / name / "run", "best.pt"))


def wait_for_child(process, module):
    """Return the number of the child that runs one of our modules, as soon as there is one."""
    wait_for(
        module, lambda: any(module in Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(process.pid))
    )
    return child(process, module)


def wait_for_lines(diary, process):
    """Return when more has been noted in a diary."""
    before = diary.stat().st_size if diary.exists() else 0
    wait_for("another line", lambda: diary.exists() and diary.stat().st_size > before, process)


@whole
def test_two_programs_with_one_key_are_named_and_the_others_go_on(images, tmp_path):
    """One of the two hears nothing for a while, then the other one, then the first again."""
    with deployed(images, tmp_path, federated={"rounds": 500, "min_sites": 2, "round_timeout": 5}) as deployment:
        shutil.copytree(deployment.kits / "charite", deployment.kits / "copy")
        deployment.folders = deployment.folders | {"copy": images["charite"]}
        for name in ["server", *NAMES, "copy"]:
            deployment.start(name)
        turns = ["charite", "copy"]
        for heard, deaf in (turns, turns[::-1], turns):
            node = wait_for_child(deployment.processes[deaf], "supernode")
            os.kill(node, signal.SIGSTOP)
            wait_for_lines(deployment.kits / heard / "state" / "rounds.log", deployment.processes[heard])
            os.kill(node, signal.SIGCONT)
        sentence = "two programs take part with the key of charite; end one of them"
        deployment.wait_for("the sentence", lambda: any(sentence in trouble for trouble in deployment.troubles()))
        rounds = len(history(deployment.run)["rounds"])
        assert all(set(NAMES[:2]) <= set(named_in(deployment.run, number)) for number in range(1, rounds + 1))


@whole
@pytest.mark.parametrize("order", [["server", *NAMES], [*NAMES, "server"]])
def test_who_is_interrupted_in_a_round_says_one_word_and_nothing_of_flower(images, tmp_path, order):
    with deployed(images, tmp_path, federated={"rounds": 50, "min_sites": 3}) as deployment:
        for name in ["server", *NAMES]:
            deployment.start(name)
        deployment.wait_for("a round", (deployment.run / "federation.json").exists)
        for name in order:
            process = deployment.processes.pop(name)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0].decode()
            assert process.returncode == 130
            assert said.splitlines()[-1] == "stopped"
            assert not re.search("Traceback|WARNING|Connection attempt|Node Unavailable", said)


# The checks of a site, without a server


@pytest.fixture
def site(tmp_path):
    return known_federation.kits(tmp_path, ["a", "b"]) / "a"


def problems(site):
    return {finding.subject: finding.problem for finding in check_site(site, site.parent) if finding.problem}


def test_a_server_that_is_not_there_is_said_to_be_so(site):
    assert "may not be started" in problems(site)["server"]


def test_a_key_that_others_may_read_is_found(site):
    (site / "node.key").chmod(0o644)
    assert "chmod 600" in problems(site)["key"]


def test_a_key_of_another_site_is_found(site):
    (site / "node.key").write_bytes((site.parent / "b" / "node.key").read_bytes())
    assert "is not the key of a" in problems(site)["key"]


@pytest.mark.parametrize("seconds, problem", [(0, None), (-200, None), (5, "5 s ahead of"), (-400, "400 s behind")])
def test_a_clock_is_right_as_long_as_the_server_takes_its_signatures(site, seconds, problem):
    def check():
        require_welcome(read_site_kit(site), Hello(time.time() - seconds, known=True))

    if problem is None:
        check()
    else:
        with pytest.raises(ConfigError, match=problem):
            check()


def test_a_site_whose_worker_cannot_start_ends_with_its_sentence(site):
    (site / "empty").mkdir()
    process = start("site", str(site), str(site / "empty"), function="hold")
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2
    assert "the worker of this site has ended" in said
    assert "run ml-split" in said
    assert "Traceback" not in said


def test_a_server_kit_whose_key_others_may_read_is_not_started(site):
    (site.parent / "server" / "server.key").chmod(0o640)
    with pytest.raises(DataError, match="chmod 600"):
        serve(site.parent / "server")


def test_a_damaged_certificate_is_found(site):
    (site / "ca.pem").write_text("nonsense")
    assert "holds no certificate" in problems(site)["certificate"]


def test_a_configuration_with_a_mistake_is_found_and_the_data_is_not_looked_at(site):
    (site / "config.yaml").write_text("data: {data_dir: DATA, num_clases: 2}\ntraining: {trainer_type: federated}\n")
    found = problems(site)
    assert "num_clases" in found["configuration"]
    assert "data" not in found


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["init", "--config", "c.yaml", "--sites", "a"], "needs --address"),
        (["site", "kit"], "needs --data_dir"),
        (["server"], "needs KIT"),
        (["server", "kit", "--check"], "--check is not for ml-federated server"),
        (["status", "kit", "--data_dir", "d"], "--data_dir is not for"),
    ],
)
def test_flags_that_are_missing_or_of_another_use_are_named(words, complaint, capsys):
    assert command.main(words) == 2
    assert complaint in capsys.readouterr().err


def test_init_prints_the_folders_that_it_wrote(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(known_federation.CONFIG)
    words = ["--sites", "a", "b", "--address", "127.0.0.1:9", "--output", str(tmp_path / "kits")]
    assert command.main(["init", "--config", str(tmp_path / "c.yaml"), *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [str(tmp_path / "kits" / name) for name in ("server", "a", "b")]
    assert all(Path(line).is_dir() for line in printed[:3])
