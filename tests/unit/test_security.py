"""What docs/security.md promises of the code as it is written, and that the tests it names are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("service", "drafters", "verifiers", "transformer", "models")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}


def named_tests() -> set[str]:
    return set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))


def test_the_tests_that_the_table_names_exist() -> None:
    written = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(named_tests()) > 10
    assert [name for name in sorted(named_tests()) if not re.search(rf"def {name}\(", written)] == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN_MODULES & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert arguments.get("trust_remote_code", "False") == "False"
            assert arguments.get("allow_pickle", "False") == "False"
            if ast.unparse(node.func) == "torch.load":
                assert arguments.get("weights_only") == "True"
