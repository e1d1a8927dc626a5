"""Flower is quiet from the moment it is imported: nothing reported, nothing asked, nothing written, no line logged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WATCHED = """
import json, sys
seen = []
def watch(event, arguments):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.mkdir"):
        seen.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append(f"open {arguments[0]}")
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import ml_src.core.federated.flower
import flwr.app, flwr.serverapp.strategy
opened = [event for event in seen if event != "socket.__new__"]
import os
from flwr.supercore import telemetry
names = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_HOME")
print(json.dumps([opened, telemetry.FLWR_TELEMETRY_ENABLED, {name: os.environ[name] for name in names}]))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)


@pytest.mark.parametrize("asked", [{}, {"FLWR_TELEMETRY_ENABLED": "1", "FLWR_DISABLE_UPDATE_CHECK": "0"}])
def test_the_import_opens_nothing_and_telemetry_is_off(asked: dict[str, str], tmp_path: Path) -> None:
    """No socket, no process, no file; even where the environment asks for the opposite."""
    finished = run(WATCHED, TMPDIR=str(tmp_path), **asked)
    assert finished.returncode == 0, finished.stderr
    opened, telemetry, environment = json.loads(finished.stdout)
    assert opened == []
    assert telemetry == "0"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert Path(environment["FLWR_HOME"]).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_named_is_kept(tmp_path: Path) -> None:
    finished = run("import ml_src.core.federated.flower, os; print(os.environ['FLWR_HOME'])", FLWR_HOME=str(tmp_path))
    assert finished.stdout.strip() == str(tmp_path)


def test_flower_logs_warnings_and_nothing_below() -> None:
    code = (
        "import ml_src.core.federated.flower\nfrom flwr.supercore import log\nlog(20, 'a detail'); log(30, 'a warning')"
    )
    finished = run(code)
    assert "a warning" in finished.stderr
    assert "a detail" not in finished.stderr + finished.stdout


def test_a_missing_flower_is_one_sentence_with_the_command() -> None:
    """What the import meets where Flower is not installed."""
    code = (
        "import sys\nsys.modules['flwr'] = None\n"
        "from ml_src.core.errors import ConfigError\n"
        "try:\n    import ml_src.core.federated.flower\nexcept ConfigError as error:\n    print(error)"
    )
    assert run(code).stdout.strip() == "federated training needs Flower: run pip install 'ml-src[federated]'"
