"""The Helm chart renders valid Kubernetes objects that keep the service's promises."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[3] / "deploy" / "kubernetes"
CHART, EXAMPLES = KUBERNETES / "diffuspec", KUBERNETES / "examples"
VERSION = "1.33"  # of the Kubernetes schemas
VARIANTS: dict[str, list[str]] = {
    "defaults": [],
    "gpu": ["--values", str(EXAMPLES / "gpu.yaml")],
    "keda": ["--set", "autoscaling.enabled=true,autoscaling.kind=keda"],
    "own volume": ["--set", "weights.drafter=a/b,weights.tokenSecret=hub,gpus=2,sharedMemory=1Gi"],
}
CUSTOM_KINDS = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "LeaderWorkerSet"}  # Kubernetes has no schemas

needs_helm = pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, timeout=120)


def render(*arguments: str) -> dict[str, dict[str, Any]]:
    """Render the chart and return its objects by kind."""
    done = helm("template", "test", str(CHART), "--namespace", "ai", *arguments)
    assert done.returncode == 0, done.stderr
    return {found["kind"]: found for found in yaml.safe_load_all(done.stdout) if found}


def pods_of(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pod templates of deployments and leader-worker sets."""
    pods = []
    for found in objects:
        if found["kind"] == "Deployment":
            pods.append(found["spec"]["template"])
        if found["kind"] == "LeaderWorkerSet":
            template = found["spec"]["leaderWorkerTemplate"]
            pods += [template["leaderTemplate"], template["workerTemplate"]]
    return pods


def everything() -> list[dict[str, Any]]:
    """Return the objects of all variants and of the multi-node example."""
    objects = [found for arguments in VARIANTS.values() for found in render(*arguments).values()]
    return objects + list(yaml.safe_load_all((EXAMPLES / "multi-node.yaml").read_text()))


@needs_helm
def test_the_chart_passes_helms_own_lint() -> None:
    for arguments in VARIANTS.values():
        done = helm("lint", "--strict", str(CHART), *arguments)
        assert done.returncode == 0, done.stdout


@needs_helm
def test_everything_is_valid_by_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate").validate
    checked = set()
    for found in everything():
        if found["kind"] in CUSTOM_KINDS:
            continue
        validate(found, VERSION, strict=True)
        checked.add(found["kind"])
    for pod in pods_of(everything()):
        validate({"apiVersion": "v1", "kind": "Pod", **pod}, VERSION, strict=True)
    assert len(checked) == 6
    with pytest.raises(Exception, match="replica"):  # proves that the check can fail
        validate({**render()["Deployment"], "spec": {"replica": 1}}, VERSION, strict=True)


@needs_helm
def test_probes_ask_what_they_should_and_draining_has_time() -> None:
    for arguments in VARIANTS.values():
        pod = render(*arguments)["Deployment"]["spec"]["template"]["spec"]
        main = pod["containers"][0]
        paths = [main[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")]
        assert paths == ["/ready", "/ready", "/health"]
        environment = {entry["name"]: entry.get("value") for entry in main["env"]}
        leaving = int(main["lifecycle"]["preStop"]["exec"]["command"][1])
        assert leaving > main["readinessProbe"]["periodSeconds"]
        assert pod["terminationGracePeriodSeconds"] > leaving + int(environment["DIFFUSPEC_SERVER__DRAIN_SECONDS"])


@needs_helm
def test_every_container_is_nobody_and_can_do_little() -> None:
    pods = pods_of(everything())
    assert len(pods) == len(VARIANTS) + 2
    for pod in pods:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # a Service's DIFFUSPEC_PORT would be refused as an unknown setting
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}


@needs_helm
def test_selectors_find_the_pods() -> None:
    objects = render(*VARIANTS["gpu"])
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert objects["Service"]["spec"]["selector"].items() <= labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert objects[kind]["spec"]["selector"]["matchLabels"].items() <= labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    monitored = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
    assert monitored <= objects["Service"]["metadata"]["labels"].items()
    assert objects["ServiceMonitor"]["spec"]["endpoints"][0]["port"] in {
        port["name"] for port in objects["Service"]["spec"]["ports"]
    }


@needs_helm
def test_replicas_follow_the_queue() -> None:
    objects = render(*VARIANTS["gpu"])
    metric = objects["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric == "vllm_num_requests_waiting"
    assert "replicas" not in objects["Deployment"]["spec"]  # otherwise every upgrade would reset them
    trigger = render(*VARIANTS["keda"])["ScaledObject"]["spec"]["triggers"][0]["metadata"]
    assert "vllm:num_requests_waiting" in trigger["query"]


@needs_helm
def test_gpus_and_weights_reach_the_container() -> None:
    pod = render(*VARIANTS["own volume"])["Deployment"]["spec"]["template"]["spec"]
    main = pod["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in main["env"]}
    assert main["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert main["resources"]["limits"]["memory"] == "4Gi"
    assert environment["DIFFUSPEC_VLLM__TENSOR_PARALLEL_SIZE"] == "2"
    assert environment["DIFFUSPEC_MODEL__DRAFTER"] == "a/b@main"
    assert pod["initContainers"][0]["args"] == ["pull", "a/b@main"]
    assert "DIFFUSPEC_MODEL__TARGET" not in environment
    mounts = {mount["name"] for mount in main["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


@needs_helm
def test_the_rules_are_those_of_the_compose_deployment(tmp_path: Path) -> None:
    groups = render(*VARIANTS["gpu"])["PrometheusRule"]["spec"]["groups"]
    files = sorted((KUBERNETES.parent / "prometheus" / "rules").glob("*.yml"))
    assert groups == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]


@needs_helm
@pytest.mark.parametrize(
    "wrong",
    [
        "gpus=-1",
        "autoscaling.kind=vpa",
        "autoscalling.enabled=true",
        "weights.target=not-a-repository",
        "settings.DIFFUSPEC_PORT=1",
        "service.port=0",
    ],
)
def test_wrong_values_are_refused_before_anything_is_rendered(wrong: str) -> None:
    done = helm("template", "test", str(CHART), "--set", wrong)
    assert done.returncode != 0
    assert "schema" in done.stderr


def test_the_values_schema_knows_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: dict[str, Any], known: dict[str, Any], where: str) -> None:
        for name, value in values.items():
            assert name in known["properties"], f"{where}{name}"
            if isinstance(value, dict) and known["properties"][name].get("properties"):
                compare(value, known["properties"][name], f"{where}{name}.")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")
