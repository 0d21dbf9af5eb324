"""The compiler's wrappers."""

import ast
from pathlib import Path

from transformer.compiled import compiled

ROOT = Path(__file__).parents[3]
PACKAGES = [ROOT / name for name in ("drafters", "transformer", "verifiers")]
MAKERS = {"empty", "zeros", "ones", "full", "empty_like", "zeros_like", "arange", "argsort", "concatenate", "repeat"}


def test_a_function_that_cannot_be_cached_is_compiled_all_the_same() -> None:
    namespace: dict[str, object] = {}
    exec("def double(value):\n    return 2 * value", namespace)  # without a file, numba has no place for its cache
    double = namespace["double"]
    assert callable(double)
    assert compiled(double)(21) == 42


def test_no_function_that_counts_no_references_makes_arrays() -> None:
    """They would never be freed, and numba only sometimes refuses."""
    kernels = [kernel for package in PACKAGES for path in package.rglob("*.py") for kernel in kernels_of(path)]
    assert {name for name, _, _ in kernels} > {"find_copy", "run_layers", "search_paths"}
    making = {name for name, decorator, _ in kernels if decorator == "allocating"} | MAKERS
    for name, decorator, called in kernels:
        assert decorator == "allocating" or not called & making, f"{name} calls {called & making}"


def kernels_of(path: Path) -> list[tuple[str, str, set[str]]]:
    """Name, decorator and what is called of each compiled function in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names = {one.id for one in node.decorator_list if isinstance(one, ast.Name)}
            called = {ast.unparse(one.func).split(".")[-1] for one in ast.walk(node) if isinstance(one, ast.Call)}
            found += [(node.name, decorator, called) for decorator in names & {"compiled", "allocating"}]
    return found
