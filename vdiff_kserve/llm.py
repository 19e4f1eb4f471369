"""The Python API: `LLM` for scripts, `AsyncLLM` for programs with an event loop.

Both run the server's own engine and check requests as the server does; the shapes are vLLM's.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ValidationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.config import ALL_SETTINGS, DECODING_FLAGS, SETTINGS, ServerConfig
from vdiff_kserve.distributed.tensor_parallel import load_sharded
from vdiff_kserve.llm_values import RequestOutput, SamplingParams, add_piece, near, output_of
from vdiff_kserve.openai.errors import invalid_body
from vdiff_kserve.openai.infilling import AUTOMATIC_LENGTHS
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.openai.service import GenerationService
from vdiff_kserve.vllm_options import hint_for

Prompt = str | Mapping[str, Any]
"""A text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`; in a mapping also what completions
have for holes: `suffix`, `infill` and `infill_lengths`."""
Message = Mapping[str, Any]
Result = TypeVar("Result")
Body = TypeVar("Body", bound=BaseModel)

HOLE_FIELDS = frozenset(("suffix", "infill", "infill_lengths"))
TEMPLATE_FIELDS = frozenset(
    ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
)

SERVER_ONLY = frozenset(
    name for name, each in SETTINGS.items() if each.group in ("server", "replicas")
)


class AsyncLLM:
    """A model in this process, answering any number of requests at once.

    `shutdown` stops its engine, as does the end of its last reference, which frees its memory.

    Args:
        model: folder of a checkpoint, or id on the hub; None is the embedded model.
        options: the server's options by name, such as `max_num_seqs=16` or `policy="threshold"`.

    Raises:
        TypeError: an option that does not exist.
        ConfigError: an option with a value that is not allowed.
        CheckpointError: the checkpoint cannot be loaded.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        config = _config(model, options)
        # On a thread that ends: OpenMP's threads of this one would stay and make the engine's own
        # sleep between operations, at half the speed.
        with ThreadPoolExecutor(max_workers=1) as loader:
            loaded = loader.submit(load_sharded, config).result()
        self._engine = loaded.engine
        self._stop = weakref.finalize(self, loaded.engine.stop)
        loaded.warm_up()
        self.tokenizer = loaded.tokenizer
        self.max_in_flight = config.max_num_seqs + config.max_queue
        self._default_max_tokens = config.default_max_tokens
        self._service = GenerationService(
            loaded.engine, loaded.tokenizer, loaded.limits, config.model_name, loaded.grammars
        )

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a text; yields the same growing output whenever text became final.

        Leaving the iteration aborts the request.

        Raises:
            RequestError: the request cannot be answered.
        """
        given = _prompt_fields(prompt)
        request = _checked(CompletionRequest, given | self._fields(sampling_params))
        text = given["prompt"] if isinstance(given["prompt"], str) else None
        async for output in self._outputs(request, "completion", text):
            yield output

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation; as `generate`.

        Args:
            template: `add_generation_prompt`, `continue_final_message` and `chat_template_kwargs`,
                as in requests.

        Raises:
            TypeError: `template` has others.
        """
        for name in template.keys() - TEMPLATE_FIELDS:
            raise TypeError(f"chat() takes {', '.join(sorted(TEMPLATE_FIELDS))}, not {name!r}")
        given = {"messages": list(messages)} | template | self._fields(sampling_params)
        if (count := given.pop("logprobs", None)) is not None:
            given |= {"logprobs": True, "top_logprobs": count}
        request = _checked(ChatCompletionRequest, given)
        async for output in self._outputs(request, "chat", None):
            yield output

    def shutdown(self) -> None:
        """Stop the engine; unfinished requests fail."""
        self._stop()

    def _fields(self, params: SamplingParams | None) -> dict[str, Any]:
        given = {} if params is None else params.model_dump(exclude_unset=True)
        if given.get("max_tokens") is None:
            given["max_tokens"] = min(
                self._default_max_tokens, self._service.limits.max_model_len - 1
            )
        return given

    async def _outputs(
        self, request: CompletionRequest | ChatCompletionRequest, endpoint: str, prompt: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        (work,) = await self._service.begin([request], endpoint)
        output = output_of(work, prompt)
        with work:
            async with aclosing(work.pieces()) as pieces:
                async for piece in pieces:
                    add_piece(output, piece, finished=work.num_unfinished == 0)
                    if piece.text or piece.finish_reason is not None:
                        yield output


class Places:
    """Rows that the engine takes at a time; who wants more waits, on the loop that uses it."""

    def __init__(self, number: int) -> None:
        self._number = self._free = number
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, rows: int) -> AsyncIterator[None]:
        """Hold so many of the places, or all of them if there are fewer."""
        rows = min(rows, self._number)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= rows)
            self._free -= rows
        try:
            yield
        finally:
            self._free += rows
            async with self._changed:
                self._changed.notify_all()


class LLM:
    """A model in this process, for scripts: `LLM().generate(["What is 17 + 25?"])`.

    Takes what `AsyncLLM` takes. It may be used from several threads, and where an event loop runs,
    as in a notebook. It ends with a `with` block, by `shutdown`, or with its last reference.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._model = AsyncLLM(model, **options)
        self._places = Places(self._model.max_in_flight)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vdiff-llm", daemon=True
        )
        self._thread.start()
        self._close = weakref.finalize(self, _close, self._model, self._loop, self._thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue texts, all at once; the outputs are in the order of the prompts.

        Args:
            sampling_params: for all prompts, or one each.
            use_tqdm: whether a progress bar shows the finished prompts.

        Raises:
            RequestError: one of the requests cannot be answered.
            RuntimeError: after `shutdown`.
        """
        one = isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable)
        many: list[Any] = [prompts] if one else list(prompts)
        each = _one_each(sampling_params, len(many))
        return self._run_all(
            [self._model.generate(*pair) for pair in zip(many, each, strict=True)],
            [_rows(*pair) for pair in zip(many, each, strict=True)],
            use_tqdm,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; as `generate`, with `template` of `AsyncLLM.chat`."""
        if isinstance(messages, str | Mapping):
            raise TypeError("messages must be a list of messages, or a list of such lists")
        many: list[Any] = list(messages)
        if many and isinstance(many[0], Mapping):
            many = [many]
        each = _one_each(sampling_params, len(many))
        return self._run_all(
            [self._model.chat(*pair, **template) for pair in zip(many, each, strict=True)],
            [_rows(*pair) for pair in zip(many, each, strict=True)],
            use_tqdm,
        )

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        """The checkpoint's tokenizer."""
        return self._model.tokenizer

    def shutdown(self) -> None:
        """Stop the engine."""
        self._close()

    def _run_all(
        self,
        outputs: Sequence[AsyncGenerator[RequestOutput, None]],
        rows: Sequence[int],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        async def run() -> list[RequestOutput]:
            with tqdm(total=len(outputs), unit="prompt", disable=not use_tqdm) as bar:

                async def last(
                    output: AsyncGenerator[RequestOutput, None], rows: int
                ) -> RequestOutput:
                    async with self._places.take(rows), aclosing(output):
                        result = [each async for each in output][-1]
                    bar.update()
                    return result

                tasks = [
                    asyncio.create_task(last(*each)) for each in zip(outputs, rows, strict=True)
                ]
                try:
                    return await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()

        return self._wait(run())

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        if not self._close.alive:
            work.close()
            raise RuntimeError("this LLM was shut down; make another one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _close(model: AsyncLLM, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End a model and the loop that it ran on."""
    model.shutdown()
    loop.call_soon_threadsafe(loop.stop)
    if threading.current_thread() is not thread:  # the garbage collector comes to any thread
        thread.join()
        loop.close()


def _config(model: str | None, options: Mapping[str, Any]) -> ServerConfig:
    allowed = ALL_SETTINGS.keys() - SERVER_ONLY - {"model"}
    for name in options.keys() - allowed:
        hint = hint_for(name)
        raise TypeError(f"{name!r} is not an option{f': {hint}' if hint else near(name, allowed)}")
    own = {name: value for name, value in options.items() if name in SETTINGS}
    decoding = {field: options[flag] for flag, field in DECODING_FLAGS.items() if flag in options}
    return ServerConfig(model=model, decoding=decoding, **own)


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the fields of a completion."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    given = dict(prompt) if isinstance(prompt, Mapping) else {}
    holes = {name: given.pop(name) for name in HOLE_FIELDS & given.keys()}
    ids = given.get("prompt_token_ids")
    if given.keys() == {"prompt_token_ids"} and all(isinstance(each, int) for each in ids or ()):
        return holes | {"prompt": list(ids or ())}
    if given.keys() != {"prompt"} or not isinstance(given["prompt"], str):
        raise TypeError(
            'a prompt is a text, {"prompt": text} or {"prompt_token_ids": [...]}, with '
            f"{', '.join(sorted(HOLE_FIELDS))} where it has holes"
        )
    return holes | given


def _checked(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    """A request, when its fields have the right types.

    Raises:
        RequestError: naming one that has not.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid_body(error.errors()) from None


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, Mapping) or not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError("sampling_params must be SamplingParams, or a list of them")
    if len(params) != count:
        raise ValueError(f"{count} prompts need as many sampling_params, got {len(params)}")
    return params


def _rows(prompt: Prompt | Sequence[Message], params: SamplingParams | None) -> int:
    """How many rows of the engine a request takes at most: its answers, in every length of a hole
    that is tried."""
    lengths = 1
    if isinstance(prompt, Mapping) and prompt.get("suffix"):
        named = prompt.get("infill_lengths")
        lengths = len(named) if isinstance(named, Sequence) else AUTOMATIC_LENGTHS
    return lengths * ((params and params.n) or 1)
