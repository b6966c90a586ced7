"""Settings for all tests: the CPU, exact float32 products, and JAX's compile cache."""

from __future__ import annotations

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/deco_jax_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Most of the tests' time goes into compiling programs that run for milliseconds: this halves it.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib") < "0.11" else []),  # unknown to later ones
    ]
).strip()

import jax
import pytest
from jaxtyping import install_import_hook

from tests import shape_checks

install_import_hook(shape_checks.CHECKED, "tests.shape_checks.check")  # before anything of them is imported

from deco_jax.run.hardware import set_xla_flags  # noqa: E402
from tests.bucket_runs import finished_run  # noqa: E402
from tests.buckets import Bucket, S3Bucket, uses  # noqa: E402

set_xla_flags()  # as the command line does


@pytest.fixture(autouse=True)
def exact_products():
    """Golden values were measured in full float32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def bucket():
    """gs://bucket on this machine."""
    made = Bucket()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def here(bucket: Bucket, monkeypatch, tmp_path):
    """This process uses the bucket, and keeps its copies and temporary files in folders of their own."""
    with uses(bucket.env, monkeypatch, tmp_path):
        yield bucket


@pytest.fixture(scope="module")
def s3_bucket():
    """s3://bucket on this machine."""
    made = S3Bucket()
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """`bucket_runs.finished_run`: a folder of images, and the workdir."""
    return finished_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def s3(s3_bucket: S3Bucket, monkeypatch, tmp_path):
    """As `here`, of s3://bucket."""
    with uses(s3_bucket.env, monkeypatch, tmp_path):
        yield s3_bucket
