"""Training speed: our step, the reference's and a peer's, alternating in one process.

    python -m benchmarks.training --shape=fashion_mnist --reference=../ml-tarflow [--peer=transformer-flows]

Prints images/s, quartiles of the step's seconds, time to the first step (with compilation), the share of the machine's
matmul rate, and the step's memory. Data are random.
"""

from collections.abc import Callable

import jax
import numpy as np

from benchmarks import common, rivals
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.flow.config import REMAT_POLICIES
from tarflow_jax.noise import Noise
from tarflow_jax.planning import forward_flops
from tarflow_jax.runtime import batch_sharding, make_mesh, use_cores_as_devices, use_mesh
from tarflow_jax.training import FlowTask, TrainConfig
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import compiled_step, jitted_step, new_state


def our_step(
    config: TarFlowConfig, images: np.ndarray, labels: np.ndarray, accumulation: int
) -> tuple[common.Run, Callable[[], int]]:
    """(the step that launch.train takes, a function that tells the bytes it needs)."""
    optimizer = Optimizer(1000, 1e-3, 1e-3, 0, 0.9, 0.95, 1e-4, 0.0, 0.0, "adamw", 0.0)
    train_config = TrainConfig(FlowTask(config, Noise("gaussian", 0.1), drop_label=0.1), optimizer, accumulation)
    mesh, key = make_mesh(), jax.random.key(0)
    step = compiled_step(train_config, mesh)
    images, labels = jax.device_put((images, labels), batch_sharding(mesh))
    state = [new_state(train_config, mesh, key)]

    def run() -> object:
        state[0], metrics = step(state[0], images, labels, key)
        return state[0], metrics

    def step_bytes() -> int:
        with use_mesh(mesh):
            compiled = jitted_step(train_config, mesh).lower(state[0], images, labels, key).compile()
        memory = compiled.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    return run, step_bytes


def main() -> None:
    """Measures and prints."""
    args = common.parse(
        __doc__,
        batch={"type": int, "help": "images a step; else the shape's"},
        remat={"choices": REMAT_POLICIES, "help": "else the shape's"},
        accumulation={"type": int, "help": "microbatches a step, of ours; else the shape's"},
        compile_reference={"action": "store_true", "help": "also the reference under torch.compile"},
    )
    config, batch, accumulation = common.shape(args, remat=args.remat)
    batch, accumulation = args.batch or batch, args.accumulation or accumulation
    use_cores_as_devices(batch // accumulation)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *config.image_shape), np.uint8)
    labels = rng.integers(0, max(config.num_classes, 1), batch).astype(np.int32)
    floats = images.astype(np.float32) / 127.5 - 1

    ours, step_bytes = our_step(config, images, labels, accumulation)
    runs = {"tarflow_jax": ours}
    if args.reference:
        runs["reference"] = rivals.Reference(args.reference, config).training(floats, labels)
    if args.reference and args.compile_reference:
        compiled = rivals.Reference(args.reference, config, compiled=True)
        runs["reference, torch.compile"] = compiled.training(floats, labels)
    if args.peer:
        runs[args.peer] = rivals.Peer(config).training(floats)

    figures = common.time_in_turns(runs, args.repeats)
    peak, peak_name = common.peak_flops(config.dtype)
    flops = 3 * batch * forward_flops(config) / figures["tarflow_jax"]["median_s"]
    figures["tarflow_jax"] |= {"flops": flops, "of_peak": flops / peak, "bytes": step_bytes()}
    print(common.table(f"training {args.shape}, batch {batch}, {config.dtype}", figures, batch, "reference"))
    print(
        f"  {flops / 1e9:,.0f} GFLOP/s, {flops / peak:.0%} of {peak / 1e9:,.0f} ({peak_name}); "
        f"{figures['tarflow_jax']['bytes'] / 2**20:,.0f} MiB"
    )
    if args.json:
        common.write_json(args.json, {args.shape: figures})


if __name__ == "__main__":
    main()
