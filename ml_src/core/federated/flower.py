"""Flower, made quiet: imported before every `flwr`, for Flower reads these settings when it is first imported.

Without them it reports each start to its makers, asks for updates, and keeps files in the home folder.
"""

import logging
import os
import secrets
import tempfile
from pathlib import Path

from ml_src.core.errors import ConfigError

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
if "FLWR_HOME" not in os.environ:
    # A name that nobody can take beforehand; Flower makes the folder only when it has something to write.
    os.environ["FLWR_HOME"] = str(Path(tempfile.gettempdir()) / f"ml-src-flower-{secrets.token_hex(8)}")

try:
    import flwr.supercore.logger  # noqa: F401  # sets its level and its handler, so before ours
except ImportError as error:
    raise ConfigError("federated training needs Flower: run pip install 'ml-src[federated]'") from error

logging.getLogger("flwr").setLevel(logging.WARNING)
