"""`pip install 'ml-src[runtime]'` in an environment of its own: no torch, and the masks of the checkpoint."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from known_networks import drawn_data, member_of
from PIL import Image

from ml_src.cli import export, inference
from ml_src.core.checkpoint import CONTENTS, save_checkpoint
from ml_src.core.config_file import plain
from ml_src.core.network.custom import SimpleUNet

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(40, 52), (33, 90), (65, 31)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the extra `runtime`."""
    uv = shutil.which("uv") or ROOT / ".uv" / "bin" / "uv"
    if not Path(uv).is_file():
        pytest.skip("no uv: make setup installs one")
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([uv, "venv", "--quiet", folder], check=True)
    found = folder / "bin" / "python"
    words = ["--quiet", "--python", found, "--constraint", ROOT / "constraints.txt", f"{ROOT}[runtime]"]
    subprocess.run([uv, "pip", "install", *words], check=True, timeout=300)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "masks").iterdir())


def test_exported_files_are_predicted_with_where_torch_was_never_installed(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn_data(Path("data"), SIZES)
    network = SimpleUNet(1, 3, base_channels=4)
    config = member_of(network, "data", **{"model.base_channels": 4, "model.num_classes": 3}).config
    empty = {key: kind() for key, kind in CONTENTS.items() if key != "format_version"}
    about = {"config": plain(config), "class_names": config.class_names, "model_state_dict": network.state_dict()}
    save_checkpoint(Path("best.pt"), {**empty, **about})
    assert export.main(["--checkpoint", "best.pt"]) == 0

    missing = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'accelerate') if u.find_spec(n)])"
    assert subprocess.run([python, "-c", missing], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    for flags in ([], ["--tile", "64", "--tta", "--overlay", "--save_probs", "--uncertainty"]):
        words = ["--input", "data/images", *flags]
        assert inference.main(["--checkpoint_path", "best.pt", "--output", "with", *words]) == 0
        free = [python.with_name("ml-inference"), "--checkpoint_path", "best.onnx", "--output", "without", *words]
        done = subprocess.run(free, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert names(Path("with")) == names(Path("without")) and len(names(Path("with"))) == len(SIZES)
        for name in names(Path("with")):
            one, other = (np.asarray(Image.open(Path(folder, "masks", name))) for folder in ("with", "without"))
            assert np.mean(one == other) >= 0.9999
        for folder in ("with", "without"):
            shutil.rmtree(folder)
