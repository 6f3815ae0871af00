"""A process for the tests to kill, starve or lock out: `worker.py MODE FOLDER`."""

# JAX and Orbax take seconds to import on a busy machine: only the modes that use them do.
import hashlib
import json
import logging
import resource
import sys

import numpy as np

from jaxattn.errors import UserError
from jaxattn.runs.rundir import open_run
from jaxattn.signals import StopSignal


def Checkpoints(folder, **options):
    from jaxattn.runs.checkpoint import Checkpoints

    return Checkpoints(folder, config={"model": {"d": 8}}, **options)


def small(seed):
    return {"w": np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32)}


def say(*words):
    print(*words, flush=True)


def killed(folder):
    """Step 1 small, step 2 so large (64 MB) that a kill lands inside its save."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, small(1))
    checkpoints.wait()
    rng = np.random.default_rng(2)
    big = {f"w{i}": rng.integers(0, 255, 1 << 23, np.uint8) for i in range(8)}
    say("saving")
    checkpoints.save(2, big)
    checkpoints.wait()
    say("saved")


def crash(folder):
    """Save step 2; the environment says where the process kills itself."""
    checkpoints = Checkpoints(folder)
    say("saving")
    checkpoints.save(2, small(2))
    checkpoints.wait()
    say("saved")


def full(folder):
    """No file may grow over 1 MB: the second save fails, the third, small again, works."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, small(1))
    checkpoints.wait()
    big = {"w": np.random.default_rng(2).standard_normal((1 << 20,)).astype(np.float32)}
    message = None
    try:
        checkpoints.save(2, big)
        checkpoints.wait()
    except UserError as error:
        message = str(error)
    left = sorted(path.name for path in checkpoints.directory.iterdir())
    checkpoints.save(3, small(3))
    checkpoints.wait()
    say(json.dumps({"message": message, "left": left, "steps": checkpoints.steps()}))


def devices(folder):
    """Restore step 1 onto two devices, compare, and save it from there as step 2."""
    import jax

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = {
        "w": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=split),
        "b": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=copied),
    }
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(target, step=1).state
        equal = np.array_equal(state["w"], small(1)["w"]) and np.array_equal(state["b"], small(2)["w"])
        checkpoints.save(2, state)
    shards = [str(shard.data.shape) for shard in state["w"].addressable_shards]
    say(json.dumps({"equal": equal, "shards": shards, "kept": state["w"].sharding == split}))


def hold(folder, *flags):
    """Open the run, say so, and keep it until stdin closes."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    try:
        with open_run(folder, resume="--resume" in flags, overwrite="--overwrite" in flags) as run:
            run.config.write_text("{}")
            say("open")
            sys.stdin.read()
    except UserError as error:
        say(f"refused: {error}")


def odd_place(folder):
    """The whole way in a strange environment (umask, LANG, path given by the test)."""
    with open_run(folder) as run:
        run.config.write_text("{}")
        with Checkpoints(run.checkpoints) as checkpoints:
            checkpoints.save(1, small(1))
    with (
        open_run(folder, resume=True) as run,
        Checkpoints(run.checkpoints, read_only=True) as checkpoints,
    ):
        restored = checkpoints.restore({"w": small(0)["w"]})
    say(json.dumps({"equal": np.array_equal(restored.state["w"], small(1)["w"])}))


def signals(busy):
    """Wait for a stop request in Python, or in one call that does not return to Python."""
    with StopSignal() as stop:
        say("ready")
        if busy == "busy":
            # As a long compile does: C code that no signal ends, so no Python handler can run.
            hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 10**9)
        while stop.requested is None:
            pass
        say(stop.requested)
        sys.stdin.read()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
