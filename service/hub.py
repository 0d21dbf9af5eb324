"""Checkpoints of the Hugging Face hub: find them on this machine by name, and fetch them for `diffuspec pull`.

huggingface_hub does the work: HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning, and
transformers and vLLM find what was pulled here. A checkpoint is a whole repository, or one of its GGUF files by name:
NAME/FILE.gguf. Python files and other weight formats are never fetched.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from service.setting_groups import NO_DRAFTER, PROMPT_LOOKUP
from service.settings import Settings

NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>(?:[\w-][\w.-]*/)*[\w-][\w.-]*\.gguf))?"
    r"(@(?P<revision>[\w./-]+))?"
)
FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class HubError(Exception):
    """The hub, or its copy on this machine, lacks what was asked for. The message is one clear sentence."""


def locate(name: str | Path) -> Path:
    """Return a checkpoint's folder or file: `name` itself if it exists, else the hub's copy on this machine.

    `NAME[/FILE.gguf]@REVISION` asks for one revision. Without a local copy, `name` is returned unchanged. Raises
    HubError for an incomplete copy.
    """
    folder = Path(name)
    if folder.exists() or not NAME.fullmatch(str(name)):
        return folder
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    repository, file, revision = _parse(str(name))
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision, local_files_only=True))
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=list(FILES)))
    except IncompleteSnapshotError:
        raise HubError(
            f"the copy of {name} on this machine is incomplete; `diffuspec pull {name}` fetches the rest."
        ) from None
    except LocalEntryNotFoundError:
        return folder


def locate_models(settings: Settings) -> Settings:
    """Replace hub names in the settings by folders. Raises HubError."""
    model = settings.model
    changes: dict[str, object] = {}
    target = locate(model.target)
    if target != model.target:
        changes |= {"target": target, "served_model_name": model.served_model_name or str(model.target)}
    if model.drafter is not None and model.drafter not in (PROMPT_LOOKUP, NO_DRAFTER):
        changes["drafter"] = str(locate(model.drafter))
    return settings.model_copy(update={"model": model.model_copy(update=changes)})


def pull(names: Sequence[str], output: TextIO) -> int:
    """Fetch checkpoints and compare their checksums with the hub's. Returns the exit status."""
    try:
        for name in names:
            _pull(name, output)
    except HubError as error:
        print(f"diffuspec: {error}", file=output)
        return 1
    return 0


def _pull(name: str, output: TextIO) -> None:
    import httpx2  # huggingface_hub's HTTP client
    from huggingface_hub import HfApi, constants, errors

    if not NAME.fullmatch(name):
        raise HubError(
            f"{name!r} is not a hub name, such as Dream-org/Dream-v0-Instruct-7B, NAME/FILE.gguf or NAME@REVISION."
        )
    repository, file, revision = _parse(name)
    wanted = list(FILES) if file is None else [file]
    api = HfApi()
    try:
        # Resolve the revision once, so that the files and the checksums belong to the same one.
        pinned = api.resolve_revision(repository, revision=revision)
        print(f"{repository} at {pinned.resolved}", file=output, flush=True)
        folder = api.snapshot_download(repository, revision=pinned, allow_patterns=wanted)
        _refuse_missing_weights(Path(folder), repository, file)
        checked = api.verify_repo_checksums(repository, revision=pinned.resolved)
    except errors.GatedRepoError:
        raise HubError(f"{repository} is gated: accept its terms on its page and set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"the hub has no {repository}; if it is private, set HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repository} has no revision {revision!r}.") from None
    except (
        errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HfHubHTTPError,
        errors.RevisionResolutionError, httpx2.HTTPError, OSError,
    ) as error:  # fmt: skip
        raise HubError(
            f"cannot fetch {repository} from {constants.ENDPOINT}: {_reason(error)}; fetched files are kept, and the "
            "same command fetches the rest."
        ) from None
    damaged = [mismatch["path"] for mismatch in checked.mismatches]
    for path in damaged:  # delete them, so that the next pull fetches them again
        link = Path(folder) / path
        link.resolve().unlink(missing_ok=True)
        link.unlink(missing_ok=True)
    if damaged:
        files = ", ".join(damaged)
        raise HubError(f"{repository}: {files} did not match the hub's checksum and was deleted; pull again.")
    print(f"  {checked.checked_count} files match the hub's checksums: {folder}", file=output)


def _refuse_missing_weights(folder: Path, repository: str, file: str | None) -> None:
    if file is not None and not (folder / file).is_file():
        raise HubError(f"{repository} has no file {file}.")
    if file is None and not any(folder.glob("*.safetensors")):
        raise HubError(
            f"{repository} has no safetensors file; a GGUF file is fetched by its name, {repository}/FILE.gguf."
        )


def _reason(error: BaseException) -> str:
    """Return the root cause of an error, in one line."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _parse(name: str) -> tuple[str, str | None, str | None]:
    """Return the repository, the GGUF file in it and the revision of a name that `NAME` matches."""
    found = NAME.fullmatch(name)
    assert found is not None
    return found["repository"], found["file"], found["revision"]
