"""Eight simulated devices for every test, a generator seeded by the test's name, and markers."""

import os
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

# Most of a test's time is compilation: ask for less of it, before the first backend starts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        # a third of the time, where XLA still has the choice
        "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else "",
    ]
)

pytest.register_assert_rewrite("commands")

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption(
        "--mixer",
        action="append",
        default=[],
        help="test the laws on package.module:MyMixer[,option=value...] too",
    )


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("-m")
    platform = jax.default_backend()
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        for accelerator in ("gpu", "tpu"):
            if item.get_closest_marker(accelerator) and platform != accelerator:
                item.add_marker(pytest.mark.skip(reason=f"needs a {accelerator.upper()}"))


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def no_mesh():
    """Opening a run sets its mesh: the next test starts without."""
    with jax.set_mesh(None):
        yield
