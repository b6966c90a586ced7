"""Checkpoints in s3://: connects Orbax with TensorStore's S3 driver.

Orbax 0.12 writes to anything that epath reaches, and TensorStore has a driver for S3, but Orbax itself only knows disks
and gs://. Three of its functions decide how a path is spelled, whether it is in a bucket, and which driver it gets.
`enable` adds s3:// to each of them. A file that is written last then marks a checkpoint as complete, which is a public
option (`atomicity`).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import orbax.checkpoint as ocp

from deco_jax.errors import UserError

SCHEME = "s3://"


def stands_for(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in S3."""
    return os.fspath(path).startswith(SCHEME)


def atomicity() -> ocp.options.AtomicityOptions:
    """Return the CheckpointManager option that lets COMMITTED mark a checkpoint as complete, as in gs://."""
    return ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


def driver(path: str) -> dict[str, Any]:
    """Return TensorStore's specification of a path in S3.

    Endpoint and region come from the variables of AWS's own tools: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION
    or AWS_DEFAULT_REGION. Without them, TensorStore asks for the bucket's region.
    """
    bucket, _, key = path.removeprefix(SCHEME).partition("/")
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        found |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        found["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # otherwise it looks for ~/.aws first, and complains if there is none
        found["aws_credentials"] = {"type": "environment"}
    return found


@functools.cache
def enable() -> None:
    """Make Orbax read and write s3://.

    Raises:
        UserError: this version of Orbax is built differently.
    """
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        spelled, is_bucket = tensorstore_utils._normalize_path, tensorstore_utils._use_gcs_driver
        driver_of = gcs_utils.get_kvstore_for_gcs
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"checkpoints can't be written to {SCHEME} with Orbax {ocp.__version__}, which isn't built like 0.12 "
            f'({error}); pip install "orbax-checkpoint==0.12.8", or mount the bucket (mountpoint-s3, FSx)'
        ) from error

    def spell(path: str) -> str:
        return SCHEME + spelled(path.removeprefix(SCHEME)) if path.startswith(SCHEME) else spelled(path)

    tensorstore_utils._normalize_path = spell
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(SCHEME) or is_bucket(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: driver(path) if path.startswith(SCHEME) else driver_of(path)
