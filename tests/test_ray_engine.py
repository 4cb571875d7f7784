"""The same tasks on a Ray cluster of two nodes: the same bytes, also when a node is killed."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SETTINGS
from photos import jpeg, name_at
from test_build import contents

from preprocessing import ray_engine
from preprocessing.build import build
from preprocessing.engine import Job
from preprocessing.plan import make_plan
from preprocessing.resize import Resizer
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from shards.console import JobError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SMALL = replace(SETTINGS, N=4, image_size=32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen groups of one cell each, so sixteen shards."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    folder.mkdir()
    for cell in range(16):
        for i in range(12):
            number = cell * 100 + i
            (folder / name_at(500003 + 20 * (cell // 4), 4180003 + 20 * (cell % 4), number)).write_bytes(
                jpeg(64, number)
            )
    return folder


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_cluster_of_two_nodes_makes_the_bytes_of_one_process_though_a_node_is_killed(photos, tmp_path, cluster):
    build(photos, tmp_path / "expected", SMALL, Machinery(1))
    worker = next(iter(cluster.worker_nodes))

    def run_tasks(*arguments):
        for count, result in enumerate(ray_engine.run_tasks(*arguments)):
            if count == 2:
                cluster.remove_node(worker, allow_graceful=False)
            yield result

    build(photos, tmp_path / "out", SMALL, Machinery(1, None, run_tasks))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_errors_of_tasks_are_the_job_s_own_and_too_many_bad_photos_stop_it(photos, tmp_path, cluster):
    machinery = Machinery(1, 0.0, ray_engine.run_tasks)
    for photo in sorted(photos.iterdir())[:3]:
        data = photo.read_bytes()
        photo.write_bytes(data[:200])
    with pytest.raises(JobError, match="photos are bad"):
        build(photos, tmp_path / "out", SMALL, machinery)
    assert not list((tmp_path / "out").rglob("*.partial"))
    plan = make_plan(Source.of(photos).photos(None, 0), SMALL)
    job = Job((Source.of(tmp_path / "gone"),), tmp_path / "out", Resizer(32, 90))
    with pytest.raises(JobError, match="source folder went away"):
        list(ray_engine.run_tasks(job, plan.tasks(), 1, lambda _: True))
