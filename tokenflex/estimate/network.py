"""What a network gives to collectives: a small table, or a file of the same figures."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Network:
    """Of a cluster.

    ranks_per_node: GPUs that talk inside a node. intra_gb_s, inter_gb_s: GB/s of each GPU, in one direction, inside a node and out of
    it. latency_us: of one hop of a collective. overlap: share of the compute that communication may hide behind.
    """

    name: str
    ranks_per_node: int
    intra_gb_s: float
    inter_gb_s: float
    latency_us: float
    overlap: float

    def seconds(self, num_bytes: float, num_ranks: int, num_collectives: float = 1.0) -> float:
        """Of gathering or reducing `num_bytes` in all over so many ranks, in so many collectives, each round a ring.

        Out of a node all its GPUs send at once, each on its own adapter.
        """
        if num_ranks == 1:
            return 0.0
        is_inside = num_ranks <= self.ranks_per_node
        out = self.inter_gb_s * self.ranks_per_node
        rate = 1e9 * (self.intra_gb_s if is_inside else min(self.intra_gb_s, out))
        hops = num_ranks - 1 if is_inside else self.ranks_per_node - 1 + math.ceil(num_ranks / self.ranks_per_node) - 1
        return num_bytes * (num_ranks - 1) / num_ranks / rate + num_collectives * hops * self.latency_us * 1e-6


NETWORKS = {
    network.name: network
    for network in (
        Network(name="ib400", ranks_per_node=8, intra_gb_s=400, inter_gb_s=45, latency_us=4, overlap=0.8),
        Network(name="ib200", ranks_per_node=8, intra_gb_s=400, inter_gb_s=22, latency_us=4, overlap=0.8),
        Network(name="ib100", ranks_per_node=8, intra_gb_s=250, inter_gb_s=11, latency_us=5, overlap=0.8),
        Network(name="eth100", ranks_per_node=8, intra_gb_s=250, inter_gb_s=1.4, latency_us=20, overlap=0.8),
        Network(name="pcie", ranks_per_node=8, intra_gb_s=20, inter_gb_s=2.8, latency_us=10, overlap=0.8),
    )
}
"""By the name that `--network` takes: an adapter of 400, 200 or 100 Gb/s per GPU beside NVLink; one of 100 Gb/s for a node of 8; no
NVLink. About nine tenths of the nominal rates; the share that hides is assumed."""
FIGURES = {field.name: field.type for field in fields(Network) if field.name != "name"}


def network_named(name: str) -> Network:
    """A network of the table, or of a YAML or JSON file with the figures of `Network`.

    Raises:
        UserError: it is neither, or figures are missing or not numbers above zero.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"--network {name}: neither in the table ({', '.join(NETWORKS)}) nor a file with {', '.join(FIGURES)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--network {name}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    missing = [key for key in FIGURES if not isinstance(values, dict) or key not in values]
    if missing:
        raise UserError(f"--network {name}: lacks {', '.join(missing)}; wanted {', '.join(FIGURES)}, one figure each")
    for key in FIGURES:
        value = values[key]
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value < 0
            or (not value and key not in ("latency_us", "overlap"))
        ):
            raise UserError(f"--network {name}: {key} is {value!r}; wanted a number above 0")
    numbers = {key: float(values[key]) for key in FIGURES if key != "ranks_per_node"}
    return Network(name=path.stem, ranks_per_node=int(values["ranks_per_node"]), **numbers)
