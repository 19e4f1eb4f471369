"""From a configuration to replicas that answer."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

import ray
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.checkpoint import find_checkpoint
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed import cluster
from vdiff_kserve.distributed.autoscale import Autoscaler, Bounds
from vdiff_kserve.distributed.meeting import Listener
from vdiff_kserve.distributed.pool import ReplicaPool
from vdiff_kserve.distributed.replica import Loader
from vdiff_kserve.distributed.supervisor import Supervisor
from vdiff_kserve.distributed.tensor_parallel import load_sharded
from vdiff_kserve.engine import Grammars, RoundObserver
from vdiff_kserve.loading import configured_tokenizer
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.structured import load_grammars
from vdiff_kserve.setting import ConfigError

logger = logging.getLogger("kserve.vdiff.replicas")

SECRET_SETTINGS = {"api_key": ()}
"""What replicas need not know."""


@dataclass(frozen=True)
class ReplicatedModel:
    """A model whose engine is a pool of replicas, one of which is ready at least.

    Attributes:
        supervisor: keeps their number, and restarts them.
        dtype, device: where and in what the first of them runs, in words.
        grammars: checks the grammars of requests; replicas compile them for themselves.
    """

    engine: ReplicaPool
    supervisor: Supervisor
    tokenizer: PreTrainedTokenizerFast
    spec: ModelSpec
    limits: ServingLimits
    dtype: str
    device: str
    grammars: Grammars | None


async def start_replicas(
    config: ServerConfig,
    observer: RoundObserver | None = None,
    loader: Loader = load_sharded,
) -> ReplicatedModel:
    """Start the replicas that `config.replicas` asks for, and wait for the first.

    The replicas' engines belong to the running loop. `stop` of the returned engine ends them.

    Args:
        observer: told of the rounds of all engines, on the loop.
        loader: makes the model of a replica, in its process.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: there is no such Ray cluster, or the port for its replicas is taken.
    """
    assert config.replicas is not None
    started = time.perf_counter()
    membership = cluster.Membership(config)
    try:
        await asyncio.wrap_future(membership.joined)
    except BaseException:
        membership.leave(wait=False)
        raise
    cluster.keep_signal_handlers()
    bounds = Bounds.parse(config.replicas)
    try:
        listener = listen(config)
    except ConfigError:
        membership.leave()
        raise
    pool = ReplicaPool(config.model_name, config.max_num_seqs, config.max_queue, observer)
    supervisor = Supervisor(
        replace(config, **SECRET_SETTINGS),  # type: ignore[arg-type]
        pool,
        cluster.ReplicaResources.of(config, ray.cluster_resources()),
        Autoscaler(bounds, config.replica_tokens or _batch_of_answers(config)),
        loader,
        listener,
    )

    def close() -> None:
        supervisor.close()
        membership.leave()

    pool.on_stop = close
    try:
        facts = await supervisor.start()
        tokenizer = await asyncio.to_thread(configured_tokenizer, config, find_checkpoint(config))
        grammars = await asyncio.to_thread(load_grammars, facts.spec, tokenizer, facts.limits)
    except BaseException:
        pool.stop()
        raise
    logger.info(
        "The first of %d replicas was ready after %.1f s.",
        bounds.low, time.perf_counter() - started,
    )  # fmt: skip
    return ReplicatedModel(
        pool, supervisor, tokenizer, facts.spec, facts.limits, facts.dtype, facts.device, grammars
    )


def listen(config: ServerConfig) -> Listener:
    """Where the replicas call.

    Raises:
        ConfigError: the port is taken.
    """
    host = cluster.own_address(config)
    try:
        return Listener(host, config.replica_port)
    except OSError as error:
        raise ConfigError(f"--replica_port {config.replica_port} on {host}: {error}") from error


def _batch_of_answers(config: ServerConfig) -> int:
    """Tokens of a full batch of answers of the default length: a replica's own, so to speak."""
    return config.max_num_seqs * config.default_max_tokens
