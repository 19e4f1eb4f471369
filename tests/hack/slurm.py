"""A Slurm cluster of one node: this machine, on free ports, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.manifests.tools import missing
from tests.server.process import free_port

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")


class Slurm:
    """Starts the daemons and stops them.

    Attributes:
        env: environment in which Slurm's commands find this cluster.
    """

    def __init__(self, folder: Path) -> None:
        absent = [name for name in PROGRAMS if shutil.which(name) is None]
        if absent:
            missing(f"{', '.join(absent)} not found (Debian's packages slurm-wlm and munge)")
        if os.getuid() != 0:
            missing("Slurm's daemons need root here")
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "USER": "root"}

    def __enter__(self) -> Self:
        folder = self.folder
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(mode=0o755)
        text = CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            controller_port=free_port(),
            node_port=free_port(),
            cpus=os.cpu_count(),
        )
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        key = folder / "munge/key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge/pid",
            f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed",
        )  # fmt: skip
        self._wait("munge.socket", lambda: (folder / "munge.socket").exists())
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        self._wait("an idle node", lambda: "idle" in self.run("sinfo", "--noheader").stdout)
        return self

    def _start(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}.out").open("wb")
        self._daemons.append(
            subprocess.Popen(command, env=self.env, stdout=output, stderr=subprocess.STDOUT)
        )

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            if time.monotonic() > deadline:
                logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                texts = [f"{log.name}:\n{log.read_text()[-1500:]}" for log in logs]
                raise TimeoutError(f"no {what}\n" + "\n".join(texts))
            time.sleep(0.5)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, timeout=300
        )

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user", "root")
        deadline = time.monotonic() + 40
        while self.run("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(20)
