"""The compiler's wrapper: kernels work where nothing can be cached, as in a read-only install."""

from transformer.compiled import compiled


def test_a_function_that_cannot_be_cached_is_compiled_all_the_same() -> None:
    namespace: dict[str, object] = {}
    exec("def double(value):\n    return 2 * value", namespace)  # without a file, numba has no place for its cache
    double = namespace["double"]
    assert callable(double)
    assert compiled(double)(21) == 42
