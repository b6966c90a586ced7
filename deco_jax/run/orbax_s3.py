"""Checkpoints in s3://: the driver of TensorStore's that Orbax leaves out.

Orbax 0.12 writes to anything that epath reaches, and TensorStore has a driver for S3, but between the two Orbax knows
only disks and gs://. Three functions of its own choose: how a path is spelled, whether it is a bucket's, and the driver
of that. `enable` puts s3:// into each. Whether a checkpoint is complete is then said by a file that is written last,
which is a public option (`atomicity`).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import orbax.checkpoint as ocp

from deco_jax.errors import UserError

SCHEME = "s3://"


def stands_for(path: str | os.PathLike[str]) -> bool:
    """Return whether a path lies in S3."""
    return os.fspath(path).startswith(SCHEME)


def atomicity() -> ocp.options.AtomicityOptions:
    """Return the option of a CheckpointManager by which COMMITTED makes a checkpoint whole, as in gs://."""
    return ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


def driver(path: str) -> dict[str, Any]:
    """Return TensorStore's specification of a path in S3.

    Endpoint and region are those that AWS's own tools take: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or
    AWS_DEFAULT_REGION. Without them TensorStore asks for the bucket's region.
    """
    bucket, _, key = path.removeprefix(SCHEME).partition("/")
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        found |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        found["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it looks for ~/.aws first, and complains where there is none
        found["aws_credentials"] = {"type": "environment"}
    return found


@functools.cache
def enable() -> None:
    """Have Orbax read and write s3://.

    Raises:
        UserError: this version of Orbax is built otherwise.
    """
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        spelled, is_bucket = tensorstore_utils._normalize_path, tensorstore_utils._use_gcs_driver
        driver_of = gcs_utils.get_kvstore_for_gcs
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"checkpoints can't be written to {SCHEME} with Orbax {ocp.__version__}, whose parts ({error}) are not "
            'those of 0.12; pip install "orbax-checkpoint==0.12.8", or mount the bucket (mountpoint-s3, FSx)'
        ) from error

    def spell(path: str) -> str:
        return SCHEME + spelled(path.removeprefix(SCHEME)) if path.startswith(SCHEME) else spelled(path)

    tensorstore_utils._normalize_path = spell
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(SCHEME) or is_bucket(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: driver(path) if path.startswith(SCHEME) else driver_of(path)
