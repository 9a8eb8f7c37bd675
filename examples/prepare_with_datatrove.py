"""Prepare studies with datatrove, in tasks on this machine, on Slurm or on Ray.

python examples/prepare_with_datatrove.py reports.csv images --output datatrove_studies --tasks 4 --workers 2
"""

from __future__ import annotations

import argparse

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from otdrg.studies import open_source
from otdrg.studies.build import BuildOptions
from otdrg.studies.distributed import BuildShare, MergeShares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", help="CSV with the columns id, image and report")
    parser.add_argument("images", help="folder of the images")
    parser.add_argument("--output", default="studies", help="folder for the dataset, on a shared file system")
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], default="local")
    parser.add_argument("--tasks", type=int, default=8, help="shares of the studies (default: 8)")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at the same time (default: all)")
    parser.add_argument("--studies-per-shard", type=int, default=500, help="studies in a file (default: 500)")
    parser.add_argument("--partition", default="cpu", help="partition of Slurm (default: cpu)")
    options = parser.parse_args()

    source = open_source("csv", table=options.table, images=options.images)
    steps = [
        step(source, options.output, BuildOptions(studies_per_shard=options.studies_per_shard))
        for step in (BuildShare, MergeShares)
    ]
    # Completed tasks are recorded in these folders: if the script is run again, they are skipped.
    logs = [f"{options.output}.logs/{name}" for name in ("build", "merge")]

    if options.executor == "slurm":
        slurm = {"partition": options.partition, "time": "04:00:00"}
        build = SlurmPipelineExecutor([steps[0]], options.tasks, workers=options.workers, logging_dir=logs[0], **slurm)
        # Submits both jobs; the second one waits for the first.
        SlurmPipelineExecutor([steps[1]], 1, depends=build, logging_dir=logs[1], **slurm).run()
        return
    executor = {"local": LocalPipelineExecutor, "ray": RayPipelineExecutor}[options.executor]
    executor([steps[0]], options.tasks, options.workers, logging_dir=logs[0]).run()
    executor([steps[1]], 1, logging_dir=logs[1]).run()


if __name__ == "__main__":
    main()
