"""The `diffuspec` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.hub import HubError, locate, locate_models
from service.settings import PREFIX, Settings, SettingsError, describe, load_settings

DESCRIPTION = """DiffuSpec serves a language model with an OpenAI-compatible API and makes it faster without
changing its text: a small diffusion model drafts several tokens at once, and the model itself verifies them."""
EPILOG = f"""Start with `diffuspec serve`. Without arguments it serves the bundled Python code model on
127.0.0.1:8000. Every setting can also be given as an environment variable, {PREFIX}GROUP__NAME, or in a
TOML or JSON file with --config."""

MODEL_FLAGS = {
    "--engine": "model.engine",
    "--target": "model.target",
    "--drafter": "model.drafter",
    "--threads": "model.num_threads",
    "--policy": "speculation.policy",
    "--max-draft-tokens": "speculation.max_draft_tokens",
    "--method": "vllm.method",
}
SERVER_FLAGS = {
    "--host": "server.host",
    "--port": "server.port",
    "--tls-certificate": "server.tls_certificate",
    "--tls-key": "server.tls_key",
    "--keys-file": "auth.keys_file",
}
METAVARS = {
    "--engine": "embedded|vllm",
    "--method": "NAME",
    "--target": "DIR|FILE.gguf|NAME",
    "--drafter": "DIR|NAME|prompt-lookup|none",
    "--policy": "goodput|paper|fixed",
    "--host": "ADDRESS",
    "--tls-certificate": "FILE",
    "--tls-key": "FILE",
    "--keys-file": "FILE",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffuspec", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="start the server", description="Start the server. It prints a banner when ready.", epilog=EPILOG
    )
    _add_settings(serve, SERVER_FLAGS | MODEL_FLAGS)
    _add_complete(commands.add_parser("complete", help="complete a text with a running server"))
    _add_check(commands.add_parser("check", help="show whether a target and a drafter fit, and what they cost"))
    pull = commands.add_parser(
        "pull",
        help="fetch checkpoints from the hub",
        description="Fetch checkpoints from the Hugging Face hub and verify their checksums. HF_HOME, HF_ENDPOINT and "
        "HF_TOKEN are honoured. A second run fetches only what is missing.",
    )
    pull.add_argument(
        "names",
        nargs="+",
        metavar="NAME[/FILE.gguf][@REVISION]",
        help="Such as Qwen/Qwen2.5-7B-Instruct. With a file's name, only that GGUF file is fetched.",
    )
    _add_convert(commands.add_parser("convert", help="write a GGUF file as a folder for transformers and vLLM"))
    warm = commands.add_parser(
        "compile",
        help="compile the drafting kernels now",
        description="Load the models once and compile the drafting kernels, so that the first start is fast.",
    )
    _add_settings(warm, MODEL_FLAGS)
    key = commands.add_parser(
        "key", help="make an API key", description="Make an API key and its entry for the --keys-file."
    )
    key.add_argument("name", help="Name of the key in logs: letters, digits, dots, dashes and underscores.")
    commands.add_parser("bench", help="compare plain and speculative decoding side by side")
    return parser


def _add_settings(parser: argparse.ArgumentParser, flags: dict[str, str]) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="Settings file, TOML or JSON.")
    for flag, name in flags.items():
        metavar = METAVARS.get(flag, "N")
        parser.add_argument(flag, dest=name, metavar=metavar, help=describe(name).replace("%", "%%").replace("`", ""))


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the model of a GGUF file as the folder that transformers and vLLM load: configuration, tokenizer, chat "
        "template, and dequantised weights (safetensors)."
    )
    parser.add_argument("source", metavar="FILE.gguf", help="The file, or NAME/FILE.gguf after `diffuspec pull`.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="A new or empty folder.")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="Number format of the weights (default: %(default)s, the file's exact values).",
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Describe the checkpoints of the target and the drafter, how their vocabularies relate, how much memory they "
        "need, and the minimum cost of a step. Nothing is loaded. The exit status is 1 if they do not fit."
    )
    parser.add_argument("target", nargs="?", metavar="TARGET", help="Folder, GGUF file or hub name; same as --target.")
    parser.add_argument("drafter", nargs="?", metavar="DRAFTER", help="Folder or name on the hub; same as --drafter.")
    parser.add_argument("--context", type=int, metavar="N", help="Tokens per request (default: the service's).")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="Concurrent requests (default: %(default)s).")
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="Memory bandwidth (default: measured on the device)."
    )
    _add_settings(parser, MODEL_FLAGS)


def _add_complete(parser: argparse.ArgumentParser) -> None:
    parser.description = "Stream a completion from a running server, and show how much of it was drafted."
    parser.add_argument("prompt", help="The text to continue; - reads it from standard input.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="The server (default: %(default)s).")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="Token limit (default: %(default)s).")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy.")
    parser.add_argument("--seed", type=int, metavar="N", help="The same seed gives the same text.")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="Stop here; up to four times.")
    parser.add_argument("--model", metavar="NAME", help="Name of the model (default: the server chooses).")
    parser.add_argument("--no-speculation", action="store_true", help="Decode plainly: the same text, slower.")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="Default: $OPENAI_API_KEY.")


def _settings(arguments: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {
        name: value for name, value in vars(arguments).items() if "." in name and value is not None
    }
    for name in ("target", "drafter"):  # positional arguments of `check`
        if getattr(arguments, name, None) is not None:
            given.setdefault(f"model.{name}", getattr(arguments, name))
    return locate_models(load_settings(arguments.config, given))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status. Heavy imports wait until a command needs them."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # its options need a slow import, which the other commands avoid
        return _bench(argv[1:])
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "serve":
            settings = _settings(arguments)
            from service.serve import serve

            return serve(settings, sys.stderr)
        if arguments.command == "check":
            from service.check import CheckOptions, check

            options = CheckOptions(arguments.context, arguments.batch, arguments.bandwidth)
            return check(_settings(arguments), sys.stdout, options)
        if arguments.command == "pull":
            from service.hub import pull

            return pull(arguments.names, sys.stderr)
        if arguments.command == "convert":
            from service.convert import run

            return run(locate(arguments.source), arguments.folder, arguments.dtype, sys.stderr)
        if arguments.command == "compile":
            from service.check import compile_kernels

            return compile_kernels(_settings(arguments), sys.stderr)
        if arguments.command == "key":
            return _make_key(arguments.name)
    except SettingsError as error:
        print(f"diffuspec: {error}", file=sys.stderr)
        return 2
    except HubError as error:
        print(f"diffuspec: {error}", file=sys.stderr)
        return 1
    return _complete(arguments)


def _make_key(name: str) -> int:
    from service.keys import make_key

    key, hashed = make_key()
    print(f"# Give this key to its user; it is not stored anywhere:\n# {key}\n[[keys]]")
    print(f'name = "{name}"\nhash = "{hashed}"')
    print("# expires = 2030-01-01\n# max_sequences = 16\n# requests_per_minute = 600\n# tokens_per_minute = 100000")
    return 0


def _complete(arguments: argparse.Namespace) -> int:
    from service.complete import CompletionOptions, complete

    options = CompletionOptions(
        url=arguments.url,
        prompt=sys.stdin.read() if arguments.prompt == "-" else arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        model=arguments.model,
        speculate=not arguments.no_speculation,
        api_key=arguments.api_key,
    )
    return complete(options, sys.stdout, sys.stderr)


def _bench(argv: Sequence[str]) -> int:
    from service.bench.arguments import add_arguments
    from service.bench.cli import run

    parser = argparse.ArgumentParser(prog="diffuspec bench")
    add_arguments(parser)
    status: int | None = run(parser.parse_args(argv))
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
