"""The service: HTTP, engines, and the command line."""

VERSION = "0.1.0"  # a test holds pyproject.toml to it
