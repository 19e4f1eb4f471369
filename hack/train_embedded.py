"""Train the embedded model: `python -m hack.train_embedded` (add `--help` for the switches).

The corpus is generated from the seed, so nothing is downloaded. A stopped run (Ctrl-C) continues
from its checkpoint in `build/embedded/`; the finished models are written to `vdiff_kserve/embedded/`.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

from hack.embedded.card import write_card
from hack.embedded.causal import causal_trainer, export_causal
from hack.embedded.checkpoint import MAX_LENGTH
from hack.embedded.diffusion import diffusion_trainer, export_diffusion
from hack.embedded.peers import Peers, start_peers
from hack.embedded.tokenizer import build_tokenizer, save_tokenizer
from hack.embedded.training import Limits, Trainer

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=75.0, help="for the diffusion model")
    parser.add_argument("--steps", type=int, help="stop after so many steps, if earlier")
    parser.add_argument("--causal_minutes", type=float, default=12.0, help="for the causal model")
    parser.add_argument("--causal_steps", type=int, help="stop after so many steps, if earlier")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="that share each batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--fresh", action="store_true", help="ignore checkpoints of earlier runs")
    parser.add_argument("--export_only", action="store_true", help="write the checkpoints' models")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "embedded")
    parser.add_argument("--out", type=Path, default=ROOT / "vdiff_kserve" / "embedded")
    return parser.parse_args()


def frozen_tokenizer(folder: Path, seed: int) -> Tokenizer:
    """The run's tokenizer: made once, then read back, so that a resumed run keeps its ids."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        build_tokenizer(seed).save(str(path))
    return Tokenizer.from_file(str(path))


def train(model: str, rank: int, arguments: argparse.Namespace) -> tuple[Trainer, bool]:
    """Resume and train one model as the switches say, in the process number `rank`.

    Returns:
        its trainer, and whether there is something to export.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(arguments.threads)
    tokenizer = frozen_tokenizer(arguments.build, arguments.seed)
    common = (tokenizer, arguments.build, arguments.device, arguments.seed)
    budget = arguments.batch_tokens // arguments.processes
    if model == "diffusion":
        trainer = diffusion_trainer(*common, budget)
        limits = Limits(arguments.minutes, arguments.steps)
    else:
        trainer = causal_trainer(*common, budget)
        limits = Limits(arguments.causal_minutes, arguments.causal_steps)
    resumed = not arguments.fresh and trainer.resume()
    if arguments.export_only:
        return trainer, resumed
    peers = Peers(rank, arguments.processes, arguments.meeting_point)
    complete = trainer.run(limits, peers)
    peers.close()
    return trainer, complete


def peer(rank: int, model: str, arguments: argparse.Namespace) -> None:
    """What a process after the first does."""
    train(model, rank, arguments)


def main() -> None:
    """Train and export the diffusion model, then the causal one."""
    arguments = parse_arguments()
    arguments.build.mkdir(parents=True, exist_ok=True)
    tokenizer = frozen_tokenizer(arguments.build, arguments.seed)
    for model in ("diffusion", "causal"):
        with tempfile.TemporaryDirectory() as folder:
            arguments.meeting_point = Path(folder) / "peers"
            if not arguments.export_only:
                start_peers(peer, arguments.processes, (model, arguments))
            trainer, complete = train(model, 0, arguments)
        if not complete:
            print(f"No finished {model} model yet; run the same command again to continue.")
            return
        if model == "diffusion":
            save_tokenizer(tokenizer, arguments.out, MAX_LENGTH)
            export_diffusion(trainer, tokenizer, arguments.out)
        else:
            export_causal(trainer, tokenizer, arguments.out / "apd")
            write_card(arguments.out, arguments.build, arguments.seed)
        print(f"Wrote the {model} model to {arguments.out}")


if __name__ == "__main__":
    main()
