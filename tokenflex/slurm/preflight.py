"""Before ranks start: every node looks at itself and its neighbours, and the job says which one is not fit and why.

`main` runs once per node and writes `report-<node>.json` into a shared folder; `problems` reads them all.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "numpy", "safetensors", "webdataset")
MAX_CLOCK_OFFSET_S = 2.0
MIN_FREE_BYTES = 1 << 30
NUM_NEIGHBOURS = 2
LINGER_S = 5.0
PORTS = range(15000, 30000)
"""Below the range that Linux hands out by itself, so that a free port stays free until rank 0 takes it."""


def main(argv: Sequence[str]) -> int:
    """The node's part; returns 0 once its report is written, whatever it says."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the job stops after the check, which takes seconds
    arguments = parse(argv)
    report: dict[str, Any] = {
        "node": arguments.node,
        "versions": versions(),
        "disks": [try_disk(path) for path in (*arguments.writable, os.environ.get("TMPDIR") or "/tmp")],
        "gpus": try_gpus(arguments.num_gpus),
        "free_port": free_port(arguments.seed),
        "peers": {},
    }
    try:
        report["address"] = address_of(arguments.interface)
    except OSError as error:
        report["address"] = ""
        report["address_error"] = error.strerror or str(error)
    folder, deadline = Path(arguments.folder), time.monotonic() + arguments.timeout_s
    with Doorbell(report["address"], arguments.node) as doorbell:
        write_json(folder / f"hello-{arguments.node}.json", {"address": report["address"], "port": doorbell.port})
        report["peers"] = ring_all(folder, peers_of(arguments.node, arguments.nodes), deadline)
        write_json(folder / f"report-{arguments.node}.json", report)
        # one that waited for a node that never came rings the others at its deadline: they must still be there
        while time.monotonic() < deadline + LINGER_S and missing(folder, "report", arguments.nodes):
            time.sleep(0.1)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The node's part's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="shared folder for the reports")
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    parser.add_argument("--nodes", nargs="+", required=True, help="all nodes of the job, in order")
    parser.add_argument("--num-gpus", type=int, default=0, help="GPUs that must work")
    parser.add_argument("--interface", default="", help="network interface of the job; empty: the default route's")
    parser.add_argument("--writable", nargs="*", default=[], help="folders that must be writable")
    parser.add_argument("--seed", type=int, default=0, help="where to begin to look for a free port")
    parser.add_argument("--timeout-s", type=float, default=60)
    return parser.parse_args(argv)


def problems(folder: str | PathLike, nodes: Sequence[str], num_gpus: int) -> list[tuple[str, str]]:
    """[(node, what is wrong with it)] by the reports in `folder`; empty if every node is fit."""
    reports: dict[str, dict[str, Any]] = {}
    for node in nodes:
        path = Path(folder) / f"report-{node}.json"
        if path.is_file():
            reports[node] = json.loads(path.read_text())
    found = [
        (node, "did not report: it is down, cannot start Python, or does not see the shared folder")
        for node in nodes
        if node not in reports
    ]
    common = {
        name: Counter(report["versions"].get(name) for report in reports.values()).most_common(1)[0][0]
        for name in {name for report in reports.values() for name in report["versions"]}
    }
    for node, report in reports.items():
        if report.get("address_error"):
            found.append((node, f"network interface: {report['address_error']}"))
        for disk in report["disks"]:
            if disk["error"]:
                found.append((node, f"cannot write to {disk['path']}: {disk['error']}"))
            elif disk["free_bytes"] < MIN_FREE_BYTES:
                found.append((node, f"{disk['path']}: {disk['free_bytes'] >> 20} MiB free, at least 1024 are wanted"))
        gpus = report["gpus"]
        if gpus["error"] or len(gpus["names"]) < num_gpus:
            found.append(
                (node, f"{len(gpus['names'])} of {num_gpus} GPUs work{gpus['error'] and ': ' + gpus['error']}")
            )
        for name, version in sorted(common.items()):
            if report["versions"].get(name) != version:
                found.append((node, f"has {name} {report['versions'].get(name)}, the others have {version}"))
    found += _network_problems(reports, nodes[0])
    return sorted(found, key=lambda item: list(nodes).index(item[0]))


def _network_problems(reports: Mapping[str, dict[str, Any]], first: str) -> list[tuple[str, str]]:
    """Peers that could not be reached (a node nobody reaches is named, not those who tried) and clocks that differ."""
    tries: dict[str, dict[str, dict[str, Any]]] = {}
    for node, report in reports.items():
        for peer, result in report["peers"].items():
            if peer in reports:  # else it is named already
                tries.setdefault(peer, {})[node] = result
    found = []
    for peer, by_node in tries.items():
        failed = {node: result["error"] for node, result in by_node.items() if result["error"]}
        if failed and len(failed) == len(by_node):
            found.append((peer, f"cannot be reached by {', '.join(failed)}: {next(iter(failed.values()))}"))
        else:
            found += [(node, f"cannot reach {peer}: {error}") for node, error in failed.items()]
    offsets = {node: result["offset_s"] for node, result in tries.get(first, {}).items() if not result["error"]}
    wrong = {node: offset for node, offset in offsets.items() if abs(offset) > MAX_CLOCK_OFFSET_S}
    if len(wrong) > len(reports) / 2:  # all the others differ from the first: it is the first that is wrong
        found.append((first, f"its clock is off by {-next(iter(wrong.values())):+.1f} s against the other nodes"))
    else:
        found += [(node, f"its clock is off by {offset:+.1f} s against {first}") for node, offset in wrong.items()]
    return found


def peers_of(node: str, nodes: Sequence[str]) -> list[str]:
    """Nodes that `node` calls: the first (clocks are compared with it) and the next ones round the ring."""
    place = nodes.index(node)
    ring = [nodes[(place + step) % len(nodes)] for step in range(1, NUM_NEIGHBOURS + 1)]
    return [peer for peer in dict.fromkeys([nodes[0], *ring]) if peer != node]


class Doorbell:
    """A socket that answers each caller with the node's name and clock, in a thread of its own."""

    def __init__(self, address: str, node: str):
        self._socket = socket.create_server((address or "0.0.0.0", 0))
        self.port = self._socket.getsockname()[1]
        self._node = node
        self._thread = threading.Thread(target=self._answer, daemon=True)

    def __enter__(self) -> "Doorbell":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
                with caller:
                    caller.sendall(json.dumps({"node": self._node, "time": time.time()}).encode())
            except OSError:
                if self._socket.fileno() < 0:
                    return


def ring_all(folder: Path, peers: Sequence[str], deadline: float) -> dict[str, dict[str, Any]]:
    """{peer: what `ring` says}, each called as soon as it is there; one that never comes holds up no other."""
    answers: dict[str, dict[str, Any]] = {}
    while len(answers) < len(peers) and time.monotonic() < deadline:
        for peer in peers:
            hello = folder / f"hello-{peer}.json"
            if peer not in answers and hello.is_file():
                answers[peer] = ring(json.loads(hello.read_text()), peer)
        time.sleep(0.05)
    silent = {"error": f"no sign of it in {folder}", "offset_s": 0.0}
    return {peer: answers.get(peer, silent) for peer in peers}


def ring(place: Mapping[str, Any], peer: str) -> dict[str, Any]:
    """Call a peer at {"address", "port"}: {"error": text or "", "offset_s": this clock minus the peer's}."""
    try:
        before = time.time()
        with socket.create_connection((place["address"], place["port"]), timeout=10) as call:
            answer = json.loads(call.recv(4096))
        middle = (before + time.time()) / 2
    except (OSError, ValueError) as error:
        return {"error": f"{place['address']}:{place['port']}: {error}", "offset_s": 0.0}
    if answer["node"] != peer:
        return {"error": f"{place['address']} is {answer['node']}", "offset_s": 0.0}
    return {"error": "", "offset_s": middle - answer["time"]}


def address_of(interface: str) -> str:
    """IPv4 address of a network interface; of the one that has the default route where none is named.

    Raises:
        OSError: no such interface, or it has no address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface:
            request = struct.pack("256s", interface.encode()[:15])
            try:
                return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR
            except OSError as error:
                names = ", ".join(name for _, name in socket.if_nameindex())
                raise OSError(
                    error.errno, f"{interface}: {error.strerror}; TOKENFLEX_NETWORK_INTERFACE must be one of {names}"
                ) from None
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only makes the kernel choose a route
        except OSError:
            return "127.0.0.1"  # no route out of this machine
        return probe.getsockname()[0]


def free_port(seed: int) -> int:
    """A TCP port that nobody listens on, looked for from a place that depends on `seed` (the job)."""
    for step in range(len(PORTS)):
        port = PORTS[(seed * 7 + step) % len(PORTS)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port in {PORTS.start}..{PORTS.stop}")


def versions() -> dict[str, str]:
    """What must be equal on all nodes: Python, libraries, and this package's own code (by checksum)."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {**found, "tokenflex": digest.hexdigest()[:12]}


def try_disk(path: str | PathLike) -> dict[str, Any]:
    """Write, sync, read and remove a file under `path` (made if missing): {"path", "error", "free_bytes"}."""
    place = Path(path).expanduser()
    probe = place / f".preflight-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(4096)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        is_same = probe.read_bytes() == content
        probe.unlink()
        status = os.statvfs(place)
    except OSError as error:
        return {"path": str(path), "error": error.strerror or str(error), "free_bytes": 0}
    problem = "" if is_same else "what was written is not what was read"
    return {"path": str(path), "error": problem, "free_bytes": status.f_bavail * status.f_frsize}


def try_gpus(number: int) -> dict[str, Any]:
    """Multiply on every GPU that torch sees: {"names": of those that work, "error": text or ""}. Without GPUs: no torch."""
    names: list[str] = []
    errors: list[str] = []
    if number:
        import torch

        for device in range(torch.cuda.device_count()):
            try:
                ones = torch.ones(256, 256, device=f"cuda:{device}")
                if (ones @ ones).sum().item() != 256.0**3:
                    raise RuntimeError("a product came out wrong")
                names.append(torch.cuda.get_device_name(device))
            except RuntimeError as error:
                errors.append(f"GPU {device}: {str(error).splitlines()[0]}")
    return {"names": names, "error": "; ".join(errors)}


def missing(folder: str | PathLike, kind: str, nodes: Sequence[str]) -> list[str]:
    """Nodes whose file of a kind is not there yet."""
    return [node for node in nodes if not (Path(folder) / f"{kind}-{node}.json").is_file()]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file that readers see whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
