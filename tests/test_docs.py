"""The documents say what is so: their commands parse, their YAML trains, their links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ml_src.core.callbacks import build_callbacks
from ml_src.core.config import Config
from ml_src.core.config_file import load_config, parse_config
from ml_src.core.data.files import read_mask
from ml_src.core.errors import ConfigError
from ml_src.core.losses import build_loss
from ml_src.core.losses.segmentation import LOSS_REGISTRY
from ml_src.core.network import build_model
from ml_src.core.network.custom import MODEL_REGISTRY
from ml_src.core.plugins import import_plugins
from ml_src.core.tasks.segmentation import Segmentation
from ml_src.core.trainers import choose_backend
from ml_src.core.transforms import build_transforms

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guide.md"
FEDERATED = ROOT / "docs" / "federated.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COMMANDS = {"ml-split": "split", "ml-init-config": "init_config", "ml-train": "train", "ml-inference": "inference"}
COMMANDS |= {"ml-check": "check", "ml-export": "export", "ml-federated": "federated", "ml-demo": "demo"}

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def name_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a document in a language."""
    return [code for _, word, code in FENCE.findall(path.read_text(encoding="utf-8")) if word == language]


def command_lines(text: str) -> list[str]:
    """The lines of a shell script that start with one of our commands, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if line.strip().startswith("ml-")]


def documented_commands() -> list[str]:
    scripts = [block for path in (ROOT / "README.md", GUIDE, FEDERATED) for block in blocks(path, "bash")]
    scripts += [path.read_text(encoding="utf-8").replace("\n#", "\n") for path in CONFIGS]
    return sorted({line for script in scripts for line in command_lines(script)})


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The long flags of a command, from its own --help."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"ml_src.cli.{COMMANDS[command]}").main(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


def test_the_readme_and_the_guide_have_commands() -> None:
    """The tests below look at what they found: the four commands of the quick start at the least."""
    assert {line.split()[0] for line in documented_commands()} >= COMMANDS.keys() - {"ml-demo"}


@pytest.mark.parametrize("line", documented_commands())
def test_a_documented_command_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder it gets as far as the files that are not there, and does not complain of its flags."""
    command, *words = shlex.split(line, comments=True)
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f"ml_src.cli.{COMMANDS[command]}").main(words) == 2
    error = capsys.readouterr().err
    assert "--help shows the usage" not in error
    missing = ("does not exist", "cannot be read (No such file", "give a folder that ml-federated init wrote")
    assert any(words in error for words in missing)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_flags_in_running_text_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands between backticks have known names and flags."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for span in re.findall(r"`(ml-[^`\n]+)`", text):
        command, *words = span.split()
        assert command in COMMANDS, span
        assert {word for word in words if word.startswith("--")} <= flags_of(command, capsys), span


@pytest.mark.parametrize("command", COMMANDS)
def test_the_guide_names_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    documented = set(re.findall(r"--\w+", GUIDE.read_text(encoding="utf-8")))
    assert flags_of(command, capsys) - {"--help"} <= documented


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = deep_merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def yaml_blocks() -> list[Any]:
    found = [(path, number, code) for path in DOCUMENTS for number, code in enumerate(blocks(path, "yaml"))]
    return [pytest.param(code, id=f"{name_of(path)}-{number}") for path, number, code in found]


@pytest.fixture
def _guides_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's my_models.py, imported; its words leave the registries after the test."""
    code = next(code for code in blocks(GUIDE, "python") if code.startswith("# my_models.py"))
    monkeypatch.chdir(tmp_path)
    Path("my_models.py").write_text(code, encoding="utf-8")
    for registry in (MODEL_REGISTRY, LOSS_REGISTRY):
        for word in ("my_custom_unet", "my_custom_loss"):
            monkeypatch.setitem(registry, word, None)
            monkeypatch.delitem(registry, word)


def assert_it_can_train(config: Config) -> None:
    """Every part of the run that needs no data can be built, and one batch goes through."""
    if config.needs_statistics:
        config = config.with_statistics([0.5], [0.25])
    import_plugins(config.plugins)
    federated = config.training.trainer_type == "federated" and config.federated
    trainer = federated.backend if federated else config.training.trainer_type  # at a site, a training like any other
    alone = config.training.model_copy(  # without the other processes, which the command would start
        update={"num_processes": None, "trainer_type": trainer}
    )
    choose_backend(config.model_copy(update={"training": alone}))
    build_callbacks(config, Segmentation.monitors)
    for specs in (config.train_transforms, config.val_transforms):
        build_transforms(specs, config.ignore_index)
    narrow = config.model.model_copy(update={"base_channels": 1})
    logits = build_model(narrow)(torch.zeros(1, config.model.in_channels, 32, 32))
    assert logits.shape == (1, config.data.num_classes, 32, 32)
    weights = config.loss.class_weights
    update = {"class_weights": None if weights == "balanced" else weights, "ignore_index": config.ignore_index}
    loss = build_loss(config.loss.model_copy(update=update))
    assert torch.isfinite(loss(logits, torch.zeros(1, 32, 32, dtype=torch.int64)))


@pytest.mark.usefixtures("_guides_plugin")
@pytest.mark.parametrize("code", yaml_blocks())
def test_a_documented_yaml_block_can_be_trained(code: str) -> None:
    """What leaves out the data section is a part of a file: it is laid over a smallest one."""
    raw = yaml.safe_load(code)
    smallest = {"data": {"data_dir": "data/my_dataset", "num_classes": 3}}
    assert_it_can_train(parse_config(raw if "data" in raw else deep_merge(smallest, raw)))


@pytest.mark.usefixtures("_guides_plugin")
@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_an_example_configuration_can_be_trained(path: Path) -> None:
    assert_it_can_train(load_config(path))


def test_a_block_that_is_wrong_would_be_noticed() -> None:
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        parse_config({"data": {"data_dir": "a", "num_classes": 3}, "training": {"batchsize": 3}})
    with pytest.raises(ConfigError, match="needs a section federated"):
        parse_config({"data": {"data_dir": "a", "num_classes": 3}, "training": {"trainer_type": "federated"}})


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_are_python(path: Path) -> None:
    for code in blocks(path, "python"):
        assert compile(code, name_of(path), "exec").co_code


def test_the_guides_table_and_command_turn_colours_into_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, on masks whose green is class 1 and whose red is class 2."""
    monkeypatch.chdir(tmp_path)
    data = Path("data/my_dataset")
    truth = np.zeros((32, 32), np.uint8)
    truth[8:24, 16:], truth[24:, :8] = 1, 2
    for folder, pixels in (
        ("images", np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)),
        ("masks", np.array([(0, 0, 0), (0, 255, 0), (255, 0, 0)], np.uint8)[truth]),
    ):
        (data / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(data / folder / "img1.png")
    (table,) = blocks(GUIDE, "csv")
    Path("colors.csv").write_text(table, encoding="utf-8")
    (line,) = (line for line in documented_commands() if "--colors" in line)
    command, *words = shlex.split(line)
    assert importlib.import_module(f"ml_src.cli.{COMMANDS[command]}").main(words) == 0, capsys.readouterr().out
    assert np.array_equal(read_mask(data / "masks_fixed" / "img1.png"), truth)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as on GitHub."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_lead_to_files_and_headings(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), f"{name_of(path)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(path)}: {link}"


@pytest.mark.parametrize("path", [GUIDE, FEDERATED], ids=name_of)
def test_every_error_under_troubleshooting_is_one_that_the_code_says(path: Path) -> None:
    """The words between the backticks, up to each `...`, stand in the sources."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "ml_src").rglob("*.py")))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # a sentence over two lines of code
    section = path.read_text(encoding="utf-8").partition("\n## Troubleshooting\n")[2].partition("\n## ")[0]
    titles = re.findall(r"^- ((?:`[^`]+`(?: or )?)+):", section, re.MULTILINE)
    assert len(titles) > 15
    fragments = [words for title in titles for words in re.findall(r"`([^`]+)`", title)]
    unsaid = [words for words in fragments if any(part.strip(" []") not in sources for part in words.split("..."))]
    assert not unsaid


def test_the_tree_of_the_architecture_page_is_the_tree() -> None:
    """Every module stands in it, and nothing that is not there."""
    tree = blocks(ROOT / "ARCHITECTURE.md", "")[0].partition("\nconfigs/")[0]
    described = {name.rpartition("/")[2] for name in re.findall(r"[\w/]+\.py", tree)}
    assert described == {path.name for path in (ROOT / "ml_src").rglob("*.py") if path.stat().st_size > 0}


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS], ids=name_of)
def test_no_leftovers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b|lorem ipsum|coming soon", text, re.IGNORECASE)
    assert not re.search("[\U0001f300-\U0001faff\u2705\u274c]", text), "no emojis"
