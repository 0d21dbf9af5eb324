"""The served model, and all else that a route needs, from the start of loading to the end of draining."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from service.engine.base import Engine, EngineStatus
from service.errors import NotFoundError, NotReadyError
from service.keys import KeyRing
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.structured import Structure, StructureCompiler, StructureSpec
from service.text.tokenizer import TextTokenizer

LONG_TEXT_CHARACTERS = 4096  # longer texts are tokenized in another thread

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is loaded: the engine, the tokenizer, and the compiler of structures for it."""

    name: str
    engine: Engine
    tokenizer: TextTokenizer
    created: int  # Unix time
    structures: StructureCompiler

    async def compile(self, spec: StructureSpec, seconds: float) -> Structure:
        """Find a structure, or compile it in another thread.

        Raises StructureError; TimeoutError if it waited `seconds` for others.
        """
        known = self.structures.find(spec)
        if known is not None:
            return known
        running = asyncio.get_running_loop().run_in_executor(self.structures.executor, self.structures.compile, spec)
        async with asyncio.timeout(seconds):
            return await running

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenize; a long text in another thread."""
        if len(text) <= LONG_TEXT_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)


class Serving:
    """One engine and its tokenizer: loading, then ready, then draining."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        load_tokenizer: Callable[[], TextTokenizer],
        metrics: ServiceMetrics,
        key_ring: KeyRing,
        draw_seed: Callable[[], int],
        clock: Clock,
        now: Clock,
    ) -> None:
        """load_tokenizer: runs in another thread, as it may take seconds. draw_seed: for requests without a seed.

        clock: measures durations, in seconds. now: Unix time.
        """
        self.settings = settings
        self.metrics = metrics
        self.key_ring = key_ring
        self.draw_seed = draw_seed
        self.clock = clock
        self.now = now
        self.name = settings.model.public_name
        self._engine = engine
        self._load_tokenizer = load_tokenizer
        self._tokenizer: TextTokenizer | None = None
        self._model: ServedModel | None = None
        self._failure: Exception | None = None
        self._is_stopping = False
        self._started = clock()
        metrics.watch_phase(lambda: self.status().phase)

    async def start(self) -> None:
        """Load tokenizer and models. Raises what made that impossible; `status` reports it, too."""
        try:
            tokenizer = self._tokenizer = await asyncio.to_thread(self._load_tokenizer)
            await self._engine.start()
        except Exception as error:
            self._failure = error
            raise
        structures = StructureCompiler(
            tokenizer.to_json, tokenizer.end_token_ids, self.settings.limits.structure_cache_size
        )
        self._model = ServedModel(self.name, self._engine, tokenizer, int(self.now()), structures)
        self.metrics.watch(self._engine)

    async def stop(self) -> None:
        """Refuse new requests, and let running ones end within the drain time. A second call does nothing."""
        if self._is_stopping:
            return
        self._is_stopping = True
        if self._model is not None:
            self._model.structures.close()
        await self._engine.stop(self.settings.server.drain_seconds)

    @property
    def seconds_since_start(self) -> float:
        return self.clock() - self._started

    @property
    def is_loaded(self) -> bool:
        """True once loading has succeeded."""
        return self._model is not None

    @property
    def failure(self) -> Exception | None:
        """The error that made loading impossible."""
        return self._failure

    def status(self) -> EngineStatus:
        """Return the engine's status; why it failed is left to the log."""
        if self._failure is not None:
            return EngineStatus("dead", "the model could not be loaded")
        status = self._engine.status()
        if self._is_stopping and status.phase in ("loading", "ready"):
            return replace(status, phase="draining", detail="the server is shutting down")
        if self._tokenizer is None:
            return replace(status, phase="loading", detail="reading the tokenizer")
        if status.phase == "dead":
            return replace(status, detail="the engine has failed; the log says why")
        return status

    def model(self, name: str | None) -> ServedModel:
        """Return the model that a request asks for; None is the one there is. Raises NotReadyError or NotFoundError."""
        status = self.status()
        if self._model is None and status.phase == "ready":  # the engine is loaded, but `start` has not finished
            status = replace(status, phase="loading")
        if status.phase != "ready" or self._model is None:
            detail = f": {status.detail}" if status.detail else ""
            raise NotReadyError(f"The server is {status.phase}{detail}.", headers={"Retry-After": "1"})
        if name is not None and name != self.name:
            raise NotFoundError(
                f"There is no model {name!r} here; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )
        return self._model
