"""Load the scripts of deploy/, which belong to no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

DEPLOY = Path(__file__).parents[3] / "deploy"


def load(path: str) -> ModuleType:
    """Return the module at `deploy/{path}.py`."""
    spec = importlib.util.spec_from_file_location("deploy_" + path.replace("/", "_"), DEPLOY / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module
