"""The cluster that the tests of a folder share."""

import pathlib
import tempfile

import pytest

from cluster import Cluster


@pytest.fixture(scope="session")
def cluster():
    with tempfile.TemporaryDirectory(prefix="millrace-clients-") as folder:
        cluster = Cluster(pathlib.Path(folder))
        cluster.start()
        yield cluster
        cluster.stop()
