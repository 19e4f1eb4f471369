"""Download a checkpoint from the Hugging Face hub into a folder that the server can serve.

    python hack/download_model.py --model_id GSAI-ML/LLaDA-8B-Instruct --model_dir /models/llada

Needs huggingface_hub alone. A run that was stopped goes on where it stopped; a run on a finished
folder checks it and downloads what is missing or damaged. An account's token comes from HF_TOKEN.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, filter_repo_objects

INCLUDED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a checkpoint needs; `vdiff_kserve.hub` downloads the same."""
SPARE_BYTES = 1 << 28
CHUNK_BYTES = 1 << 22
PART = ".part"


class DownloadError(Exception):
    """The checkpoint cannot be had; the message says why."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model_id", "--model-id", required=True, help="such as GSAI-ML/LLaDA-8B-Instruct"
    )
    parser.add_argument(
        "--model_dir", "--model-dir", required=True, type=Path, help="folder to fill"
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit (%(default)s)")
    parser.add_argument(
        "--include", nargs="+", default=INCLUDED, help=f"patterns of files ({' '.join(INCLUDED)})"
    )
    parser.add_argument("--exclude", nargs="+", default=(), help="patterns of files to leave out")
    parser.add_argument("--workers", type=int, default=4, help="files at a time (%(default)s)")
    parser.add_argument(
        "--log_seconds",
        "--log-seconds",
        type=float,
        default=10,
        help="time between progress lines (%(default)s)",
    )
    parser.add_argument(
        "--no_verify",
        "--no-verify",
        action="store_true",
        help="compare sizes only, not the files' hashes",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Download and check. Returns the process's exit code."""
    arguments = parse_arguments(argv)
    try:
        download(arguments)
    except (DownloadError, HfHubHTTPError, HFValidationError, OSError) as error:
        say(f"error: {error}")
        return 1
    except ClientError as error:  # httpx's, or httpx2's where huggingface_hub is 2.0 or later
        say(f"error: {arguments.model_id}: {constants.ENDPOINT} cannot be reached ({error})")
        return 1
    return 0


def download(arguments: argparse.Namespace) -> None:
    """Fill the folder and check it; files that are damaged are downloaded once more.

    Raises:
        DownloadError: not enough disk, nothing to download, or files still damaged.
    """
    info = HfApi().model_info(arguments.model_id, revision=arguments.revision, files_metadata=True)
    files = wanted(info, arguments)
    total = sum(file.size or 0 for file in files)
    folder: Path = arguments.model_dir
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{info.id} at {info.sha}: {len(files)} files, {gigabytes(total)}, into {folder}")
    require_space(folder, files)

    unfinished = files
    for attempt in range(2):
        with progress(folder, total, arguments.log_seconds):
            bring(info, unfinished, folder, arguments.workers)
        unfinished = [f for f in files if not intact(folder, f, not arguments.no_verify)]
        if not unfinished:
            say(f"done: {folder} holds {info.id} at {info.sha}")
            return
        names = ", ".join(file.rfilename for file in unfinished)
        if attempt:
            raise DownloadError(f"differ from the hub's: {names}")
        say(f"damaged, downloading again: {names}")
        for file in unfinished:
            (folder / file.rfilename).unlink()


def bring(info: ModelInfo, files: Sequence[RepoSibling], folder: Path, workers: int) -> None:
    """Download the files whose size is not right, some at a time."""
    missing = [file for file in files if not intact(folder, file, compare_hashes=False)]
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(bring_one, info, file, folder) for file in missing]
        try:
            for each in waiting:
                each.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def bring_one(info: ModelInfo, file: RepoSibling, folder: Path) -> None:
    """Download one file, from where an earlier run stopped."""
    part = part_of(folder, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as target:
        done = target.tell()
        if file.size is not None and done > file.size:  # of another revision
            target.truncate(0)
            done = 0
        http_get(
            hf_hub_url(info.id, file.rfilename, revision=info.sha),
            target,
            resume_size=done,
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
    part.rename(folder / file.rfilename)


def part_of(folder: Path, file: RepoSibling) -> Path:
    """Where a file is while it is not whole."""
    return folder / f"{file.rfilename}{PART}"


def wanted(info: ModelInfo, arguments: argparse.Namespace) -> list[RepoSibling]:
    """The files of the repository that the patterns choose."""
    files = list(
        filter_repo_objects(
            info.siblings or (),
            allow_patterns=list(arguments.include),
            ignore_patterns=list(arguments.exclude) or None,
            key=lambda file: file.rfilename,
        )
    )
    if not files:
        raise DownloadError(f"{info.id} has no file like {' '.join(arguments.include)}")
    return files


def require_space(folder: Path, files: Sequence[RepoSibling]) -> None:
    """Fail early when the disk cannot hold what is missing."""
    missing = sum(
        file.size or 0 for file in files if not intact(folder, file, compare_hashes=False)
    )
    needed = missing - sum(part.stat().st_size for part in folder.rglob(f"*{PART}"))
    free = shutil.disk_usage(folder).free
    if missing and needed + SPARE_BYTES > free:
        raise DownloadError(f"{folder} has {gigabytes(free)} free, {gigabytes(needed)} are needed")


def intact(folder: Path, file: RepoSibling, compare_hashes: bool) -> bool:
    """Whether a file is there as the hub has it."""
    path = folder / file.rfilename
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if not compare_hashes:
        return True
    if file.lfs is not None:
        return digest(path, hashlib.sha256()) == file.lfs.sha256
    git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    return digest(path, git) == file.blob_id


def digest(path: Path, hasher: hashlib._Hash) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


@contextmanager
def progress(folder: Path, total: int, seconds: float) -> Iterator[None]:
    """Write a line now and then: progress bars do not suit a log."""
    disable_progress_bars()
    done = threading.Event()

    def watch() -> None:
        start, first = time.monotonic(), present(folder)
        while not done.wait(seconds):
            now = present(folder)
            speed = (now - first) / (time.monotonic() - start)
            share = min(now, total) / max(total, 1)
            say(f"{gigabytes(now)} of {gigabytes(total)} ({share:.0%}), {speed / 1e6:.1f} MB/s")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def present(folder: Path) -> int:
    """Bytes of the folder's files, unfinished ones included."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a part that was just finished
            continue
    return total


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    os.umask(0o022)  # other users' servers read the files
    sys.exit(main())
