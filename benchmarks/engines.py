"""Time the reports of transformers beside those of vLLM, and count equal ones; features are encoded before.

CPU seconds are those of this process and the server it starts; on a busy machine they say more than the clock.

OTDRG_VLLM=~/vllm/bin/vllm python benchmarks/engines.py checkpoints/otdrg-iu-xray recipes/iu_xray_scratch.yaml
"""

from __future__ import annotations

import argparse
import time

import psutil
from otdrg.inference.features import cache_features
from otdrg.inference.generation import generate_reports
from otdrg.inference.loading import decoding, load_published
from otdrg.inference.vllm import VLLM
from otdrg.training.data import evaluation_studies


def cpu_seconds() -> float:
    """CPU seconds that this process and its children have used."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def main() -> None:
    """Print reports per second, of transformers for each batch size, then of its best one and vLLM in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a run or a model")
    parser.add_argument("dataset", help="recipe or folder of otdrg prepare")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128], metavar="N")
    parser.add_argument("--vllm-batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine-url", metavar="URL")
    parser.add_argument("--features", default="build/features", metavar="DIR")
    options = parser.parse_args()
    model, processor = load_published(options.model, dtype=options.dtype)
    rows = evaluation_studies(options.dataset, "validation").rows
    studies = cache_features(model, processor, rows, options.features, 8)
    generation = decoding(model, num_beams=1)
    indication = model.config.indication_reader != "report"

    def timed(batch_size: int, engine: VLLM | None = None) -> tuple[float, list[str]]:
        start, used = time.perf_counter(), cpu_seconds()
        found = generate_reports(model, processor, studies, batch_size, generation, None, indication, engine=engine)
        speed, cheapness = len(studies) / (time.perf_counter() - start), len(studies) / (cpu_seconds() - used)
        name = "transformers" if engine is None else "vLLM"
        print(f"{name}, batch size {batch_size}: {speed:.1f} reports/s, {cheapness:.1f} per CPU second", flush=True)
        return cheapness if model.device.type == "cpu" else speed, found.reports

    best = max(options.batch_sizes, key=lambda batch_size: timed(batch_size)[0])
    start = time.perf_counter()
    with VLLM(model, processor, options.engine_url) as engine:
        engine.connect()
        print(f"vLLM was ready after {time.perf_counter() - start:.0f} s", flush=True)
        for _ in range(2):
            ours = timed(best)[1]
            theirs = timed(options.vllm_batch_size, engine)[1]
    other = [place for place in range(len(ours)) if ours[place] != theirs[place]]
    print(f"{len(ours) - len(other)} of {len(ours)} reports are equal")
    for place in other:
        print(f"{studies['id'][place]}\n  transformers: {ours[place]}\n  vLLM:         {theirs[place]}")


if __name__ == "__main__":
    main()
