"""A sweep of 64 points over a Ray cluster of three nodes on this machine, one of which is killed.

    python experiments/training_speed/lost_node.py

A dry run: nothing is trained, but everything is selected, converted, measured and saved.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from ray.cluster_utils import Cluster

from rmprune import sweep as sweeps
from rmprune.checkpoints import SlimConfig
from rmprune.data import load_data
from rmprune.workers import RayCluster

KILL_AFTER = 10  # points


def main() -> int:
    """Run the sweep and check its table."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    plan = sweeps.Sweep(
        SlimConfig(epochs=0, finetune_epochs=0),
        models=(("resnet20", None),),
        methods=("rm",),
        sparsities=(0.0,),
        levels=tuple(f"threshold={value / 10:g}" for value in range(8)),
        seeds=tuple(range(8)),
    )
    said = 0

    def say(text: str) -> None:
        nonlocal said
        print(text, flush=True)
        said += 1
        if said == KILL_AFTER:
            cluster.remove_node(nodes[1], allow_graceful=False)
            print("one of three nodes killed", flush=True)

    workers = RayCluster(cluster.address)
    try:
        with tempfile.TemporaryDirectory() as folder:
            table = sweeps.run(Path(folder), plan, partial(load_data, "digits"), workers, say)
    finally:
        workers.close()
        cluster.shutdown()
    points = table[["seed", "level"]].drop_duplicates()
    print(f"{len(table)} rows, {len(points)} different points, {table['error'].count()} failed")
    return 0 if len(table) == len(points) == 64 and not table["error"].count() else 1


if __name__ == "__main__":
    sys.exit(main())
