"""Images of tasks on workers: the server's digest decides what a host runs. The engine is `processes`."""

import json

import pytest

from doubles.cluster_deployment import ClusterDeployment
from doubles.deployment import bash_turn, reply_turn
from doubles.image_archives import directory, entry, layer, minimal_root, oci_archive
from doubles.remote_deployment import closing_deployment
from sandbox.images.image_builder import import_image
from sandbox.images.image_store import ImageStore
from sandbox.images.image_transfer import HostImageCopies
from sandbox.images.profiles import ProfileCatalog

SHOW_MARKER = bash_turn("cat /opt/tools/marker")


@pytest.fixture
def deploy(tmp_path):
    with closing_deployment(ClusterDeployment(tmp_path)) as start:
        yield start


@pytest.fixture
def add_image(tmp_path):
    """Return a function that imports an image with this marker in a data directory, and returns the image's name."""
    root_layer = minimal_root()

    def add(data_dir, marker, name="my-tools"):
        marker_layer = layer(directory("opt/tools"), entry("opt/tools/marker", marker.encode()))
        archive = oci_archive(tmp_path / f"{marker}.tar", root_layer, marker_layer)
        return f"{name}@{import_image(ProfileCatalog(data_dir).image_store(name), archive).digest}"

    return add


def check_task_used(deployment, task_id, image, marker):
    status = deployment.wait(task_id)
    assert (status["state"], status["error"]) == ("completed", None), deployment.diagnostics()
    assert status["vm"]["image"] == image
    assert json.loads(deployment.artifact("metadata.json", task_id))["sandbox"]["image"] == image
    assert deployment.tool_results()[-1] == marker


@pytest.mark.timeout(300)
def test_host_gets_the_image_of_the_server(deploy, add_image):
    """The host has a different image with the same name, which no task uses, and files of an interrupted transfer."""
    deployment = deploy(SHOW_MARKER, reply_turn())
    part = deployment.host_data_dir / "profiles/other/part"
    part.mkdir(parents=True)
    own = add_image(deployment.host_data_dir, "of the host")
    image = add_image(deployment.data_dir, "of the server")
    assert image != own
    deployment.submit(vm={"profile": "my-tools"})
    check_task_used(deployment, "task-1", image, "of the server")
    assert not part.exists()
    store = ImageStore(deployment.host_data_dir, "my-tools")
    copied_at = store.rootfs_path(image.partition("@")[2]).parent.stat().st_ctime_ns
    deployment.submit("task-2", vm={"profile": "my-tools"})
    assert deployment.wait("task-2")["vm"]["image"] == image
    assert store.rootfs_path(image.partition("@")[2]).parent.stat().st_ctime_ns == copied_at


@pytest.mark.timeout(300)
def test_host_with_the_same_digest_fetches_nothing(deploy, add_image):
    deployment = deploy(SHOW_MARKER, reply_turn())
    image = add_image(deployment.host_data_dir, "the same")
    assert add_image(deployment.data_dir, "the same") == image
    deployment.submit(vm={"profile": "my-tools"})
    check_task_used(deployment, "task-1", image, "the same")
    assert ImageStore(deployment.host_data_dir, "my-tools").read_current().source.startswith("OCI image")


@pytest.mark.timeout(300)
def test_image_that_only_the_host_has_is_refused(deploy, add_image):
    deployment = deploy(bash_turn("echo done"), reply_turn())
    add_image(deployment.host_data_dir, "of the host", "basic")
    deployment.submit(vm={"profile": "basic"}, lifecycle={"retries": 1})
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "provision_failed"), deployment.diagnostics()
    assert "The server has no image of the profile basic, but this host has one" in status["error"]["message"]
    assert deployment.attempts() == []
    ProfileCatalog(deployment.host_data_dir).image_store("basic").remove_images()
    deployment.submit("task-2", vm={"profile": "basic"})
    status = deployment.wait("task-2")
    assert (status["state"], status["vm"]["image"]) == ("completed", "host"), deployment.diagnostics()
    HostImageCopies(deployment.host_data_dir).check_no_own_image("basic")
