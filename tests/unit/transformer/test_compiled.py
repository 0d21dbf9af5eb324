"""The decorators `compiled` and `allocating`."""

import ast
from pathlib import Path

from transformer.compiled import compiled

ROOT = Path(__file__).parents[3]
PACKAGES = [ROOT / name for name in ("drafters", "transformer", "verifiers")]


def test_a_function_that_cannot_be_cached_is_still_compiled() -> None:
    namespace: dict[str, object] = {}
    exec("def double(value):\n    return 2 * value", namespace)  # without a file, numba cannot cache it
    double = namespace["double"]
    assert callable(double)
    assert compiled(double)(21) == 42


def test_kernels_without_reference_counts_call_nothing_that_makes_arrays() -> None:
    """numba refuses to make arrays in them, but not to call functions that do; such arrays would never be freed."""
    kernels = [kernel for package in PACKAGES for path in package.rglob("*.py") for kernel in kernels_of(path)]
    assert {name for name, _, _ in kernels} > {"find_copy", "run_layers", "search_paths", "new_select_workspace"}
    making = {name for name, decorator, _ in kernels if decorator == "allocating"}
    for name, decorator, called in kernels:
        assert decorator == "allocating" or not called & making, f"{name} calls {called & making}"


def kernels_of(path: Path) -> list[tuple[str, str, set[str]]]:
    """Return name, decorator and called functions of each compiled function in a file, by bare names."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    decorators = {node.name: {one.id for one in node.decorator_list if isinstance(one, ast.Name)} for node in functions}
    for node in ast.walk(tree):  # `kernel = compiled(function)`
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
            decorators.setdefault(ast.unparse(node.args[0]), set()).add(node.func.id)
    found = []
    for node in functions:
        called = {ast.unparse(one.func).split(".")[-1] for one in ast.walk(node) if isinstance(one, ast.Call)}
        found += [(node.name, kind, called) for kind in decorators[node.name] & {"compiled", "allocating"}]
    return found
