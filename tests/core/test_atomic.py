"""One writer a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from ml_src.core.atomic import only_writer
from ml_src.core.errors import ConfigError

OTHER = """
import sys
from pathlib import Path
from ml_src.core.atomic import only_writer
with only_writer(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_goes(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="the system has no locks of this kind")
    command = [sys.executable, "-c", OTHER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with (
            pytest.raises(ConfigError, match=r"out: wait for it, or give another --output"),
            only_writer(tmp_path / "out"),
        ):
            pass
        other.kill()
        other.wait()
    with only_writer(tmp_path / "out"):
        pass
