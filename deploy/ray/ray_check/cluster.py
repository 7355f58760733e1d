"""A Ray cluster of this machine alone, with the application on it, and the single server to compare with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parents[1]
CONFIG = HERE / "serve-cpu.yaml"
_START_SECONDS = 600.0
_END_SECONDS = 30.0


class Failed(RuntimeError):
    """The cluster did not do what it should have done in time."""


def environment() -> dict[str, str]:
    """Of all processes: the application can be imported, and no replica gives way to others (Ray's workers
    are nice, by 15)."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


class Cluster:
    """Ray and Serve on ports from `port` on: Serve's own, Ray's next, Ray's client's; metrics from +10 on."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.metrics_port = port + 10
        self._port, self._folder = port, folder
        self._head: subprocess.Popen[bytes] | None = None

    def start(self, cpus: int) -> None:
        command = [_script("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--port={self._port + 1}", f"--ray-client-server-port={self._port + 2}"]
        command += ["--include-dashboard=false", f"--num-cpus={cpus}", "--num-gpus=0"]
        command += [f"--temp-dir={self._folder}", "--object-store-memory=200000000", "--disable-usage-stats"]
        log = open(self._folder / "ray.log", "wb")  # noqa: SIM115 (the process outlives this function)
        with log:
            self._head = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)

    def deploy(self, replicas: int) -> None:
        """Applies the config with this number of replicas and waits until they serve. Raises Failed."""
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(self._config(replicas)))
        address = f"127.0.0.1:{self._port + 1}"
        command = [_script("serve"), "run", "--non-blocking", f"--address={address}", str(path)]
        done = None
        for _ in range(30):  # Ray may be starting still
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                break
            time.sleep(1.0)
        else:
            raise Failed(f"serve run failed: {done.stderr[-2000:] if done else ''}")
        self.wait(lambda: len(self.replicas()) == replicas and self._answers(), f"{replicas} replicas")

    def _config(self, replicas: int) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
        config["http_options"]["port"] = self._port
        application = config["applications"][0]
        application["args"]["metrics_port"] = self.metrics_port
        for deployment in application["deployments"]:
            if deployment["name"] == "Replica":
                deployment["num_replicas"] = replicas
        return config

    def replicas(self) -> dict[str, int]:
        """The metrics ports of the replicas that answer there, by replica."""
        found = {}
        for port in range(self.metrics_port, self.metrics_port + 8):
            try:
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text
            except httpx.HTTPError:
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == "disco_engine_up" and sample.value == 1:
                        found[sample.labels["replica"]] = port
        return found

    def metric(self, port: int, name: str, **labels: str) -> float:
        """The sum over the samples of that name that have these labels."""
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
        samples = (each for family in text_string_to_metric_families(text) for each in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def process(self, port: int) -> psutil.Process:
        """The replica's process, by its metrics port."""
        for process in self._processes():
            try:
                listening = [
                    c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN
                ]
            except psutil.Error:
                continue
            if port in listening:
                return process
        raise Failed(f"no process listens on {port}")

    def wait(self, done: Callable[[], bool], what: str, seconds: float = _START_SECONDS) -> float:
        """Waits until `done`; the seconds it took. Raises Failed."""
        started = time.monotonic()
        while not done():
            if time.monotonic() - started > seconds:
                raise Failed(f"no {what} within {seconds:g} s")
            if self._head is None or self._head.poll() is not None:
                raise Failed(f"Ray ended: {(self._folder / 'ray.log').read_text()[-2000:]}")
            time.sleep(0.2)
        return time.monotonic() - started

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        return 0.0 if self._head is None else _cpu_seconds(self._head.pid)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    def _processes(self) -> list[psutil.Process]:
        return [] if self._head is None else psutil.Process(self._head.pid).children(recursive=True)

    def stop(self) -> None:
        """Ends everything that `start` and what it started have started, and nothing else."""
        if self._head is None:
            return
        processes = self._processes()
        self._head.send_signal(signal.SIGTERM)
        try:
            self._head.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._head.kill()
        for process in psutil.wait_procs(processes, timeout=10)[1]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


@contextmanager
def cluster(port: int, cpus: int, folder: Path | None = None) -> Iterator[Cluster]:
    """A started cluster; its files are kept if a folder is given."""
    place = folder or Path(tempfile.mkdtemp(prefix="disco-ray-"))
    place.mkdir(parents=True, exist_ok=True)
    made = Cluster(port, place)
    try:
        made.start(cpus)
        yield made
    finally:
        made.stop()
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def single_server(port: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """One server without Ray, with the settings of the config: its address, and what its processes have had
    of the CPU, in seconds."""
    settings = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]["settings"]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", f"--port={port}", *flags]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                if httpx.get(f"{url}/ready", timeout=60).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed("the single server did not start")
            time.sleep(0.2)
        yield url, lambda: _cpu_seconds(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _cpu_seconds(pid: int) -> float:
    root = psutil.Process(pid)
    seconds = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended since
            continue
        seconds += times.user + times.system
    return seconds


def _script(name: str) -> str:
    """A command of this interpreter's environment."""
    return str(Path(sys.executable).with_name(name))
