"""One of several processes that compress small models together; started by torchrun.

torchrun --nproc-per-node 2 tests/work_together.py FOLDER [which]
"""

import os
import sys

import torch
import torch.distributed as dist
from models import FAMILIES
from transformers.utils import logging

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.errors import PGSVDError


NAMES = ("llama", "clip", "t5", "qwen3_moe")
BATCHES = 5


def config(name, **settings):
    dataset = FAMILIES[name].batches(BATCHES)
    return PGSVDConfig(**{"parameter_reduction": 0.3, "dataset": dataset, "num_samples": 1000} | settings)


def in_memory(folder):
    """Every family, parallel and anchored; each process keeps what came of it."""
    found = {}
    for name in NAMES:
        storage = "pivoted" if name == "clip" else "factors"
        for calibration in ("parallel", "anchored"):
            model = FAMILIES[name].build()
            settings = {"calibration": calibration, "storage": storage, "correct_bias": name == "clip"}
            report = PGSVDCompressor(config(name, **settings)).compress(model)
            layers = [(layer.name, layer.rank, layer.tokens, layer.activation_error) for layer in report.layers]
            found[name, calibration] = model.state_dict(), layers
    for name in ("llama", "t5"):
        model = FAMILIES[name].build()
        report = PGSVDCompressor(config(name, objective="loss", allocation="loss")).compress(model)
        layers = [(layer.name, layer.rank, layer.tokens, layer.activation_error) for layer in report.layers]
        found[name, "loss"] = model.state_dict(), layers
    for solver in ("asvd", "fwsvd", "svd_llm"):
        model = FAMILIES["llama"].build()
        report = PGSVDCompressor(config("llama", solver=solver, allocation="pareto_outputs")).compress(model)
        layers = [(layer.name, layer.rank, layer.tokens, layer.activation_error) for layer in report.layers]
        found["llama", solver] = model.state_dict(), layers
    torch.save(found, os.path.join(folder, f"in_memory-{dist.get_rank() if dist.is_initialized() else 'alone'}.pt"))


def from_disk(folder):
    """A checkpoint, and measurements of it."""
    many = "together" if dist.is_initialized() else "alone"
    for calibration in ("parallel", "anchored"):
        output = os.path.join(folder, f"{calibration}-{many}")
        PGSVDCompressor(config("t5", calibration=calibration)).compress_checkpoint(os.path.join(folder, "t5"), output)
    elastic = PGSVDCompressor(config("t5", parameter_reduction=0.02, elastic=True))
    elastic.compress_checkpoint(os.path.join(folder, "t5"), os.path.join(folder, f"elastic-{many}"))
    stats = os.path.join(folder, f"stats-{many}")
    PGSVDCompressor(config("t5")).measure_checkpoint(os.path.join(folder, "t5"), stats)


def mixed(folder):
    """Of two processes, one has the images and the other the texts alone."""
    images, texts = FAMILIES["llava"].batches(2), FAMILIES["llama"].batches(2, seed=1)
    batches = [images[0], texts[0], images[1], texts[1]]
    many = "together" if dist.is_initialized() else "alone"
    for calibration in ("parallel", "anchored"):
        output = os.path.join(folder, f"mixed-{calibration}-{many}")
        compressor = PGSVDCompressor(config("llava", dataset=batches, calibration=calibration))
        compressor.compress_checkpoint(os.path.join(folder, "llava"), output)


def other_data(folder):
    """Each process has a calibration set of its own."""
    batches = FAMILIES["llama"].batches(BATCHES + 1)[dist.get_rank() :][:BATCHES]
    PGSVDCompressor(config("llama", dataset=batches)).compress(FAMILIES["llama"].build())


def too_few(folder):
    """One batch for all processes."""
    PGSVDCompressor(config("llama", dataset=FAMILIES["llama"].batches(1))).compress(FAMILIES["llama"].build())


def damaged(folder):
    """The main process cannot take the output."""
    PGSVDCompressor(config("t5")).compress_checkpoint(os.path.join(folder, "t5"), os.path.join(folder, "t5"))


def dies(folder):
    """The second process is gone in the middle."""
    from optimum_pgsvd.factoring import blocks

    def die(*args):
        os._exit(7)

    if dist.get_rank() == 1:
        blocks.factor_layer = die
    PGSVDCompressor(config("llama")).compress(FAMILIES["llama"].build())


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    try:
        for which in sys.argv[2:] or ("in_memory", "from_disk"):
            globals()[which](sys.argv[1])
        if dist.is_initialized():
            dist.barrier()  # gloo ends with an abort where a peer is gone before it
            dist.destroy_process_group()
    except PGSVDError as error:
        print(f"process {os.environ.get('RANK')}: {type(error).__name__}: {error}", flush=True)
        sys.exit(3)
