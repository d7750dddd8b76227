"""Ready-made configurations by name: in a clone those of configuration/, after `pip install` those of the package."""

import json
from pathlib import Path
from typing import Any

from ..configuration_griffin import GriffinConfig


HERE = Path(__file__).resolve().parents[2]
# A clone has them beside the package; a wheel installs them as griffin_configuration.
FOLDERS = (HERE / "configuration" / "model", HERE / "griffin_configuration" / "model")


def config_from_preset(name: str, config_class: type[GriffinConfig], **overrides: Any) -> GriffinConfig:
    """A `config_class` (GriffinConfig) of the ready-made configuration `name`, for example "griffin-100m".

    overrides: fields that differ from it. Raises ValueError for a name that there is none of.
    """
    files = {path.stem: path for folder in FOLDERS for path in folder.glob("*.json")}
    if not isinstance(name, str) or name not in files:
        raise ValueError(f"preset = {name!r}: allowed are {', '.join(sorted(files))}")
    fields = json.loads(files[name].read_text(encoding="utf-8"))
    fields.pop("model_type", None)
    return config_class(**{**fields, **overrides})
