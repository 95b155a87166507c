"""Renders the Helm chart as users would and checks the result: schemas, and properties that a schema cannot express.

`python chart.py CHART`; every case is a set of values. Exits with 1 and a list of faults if a check fails.
"""

import pathlib
import re
import sqlite3
import sys

import helm_python
import kubernetes_validate
import pydantic
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject, TriggerAuthentication
from cloudcoil.models.prometheus_operator.v1 import PodMonitor

# The addresses that the program rejects for webhooks; the network policy must reject them too.
ADDRESSES = (pathlib.Path(__file__).parents[2] / "src/jobs/address.rs").read_text()
V4 = re.findall(r"\(\[(\d+), (\d+), (\d+), (\d+)\], (\d+)\)", ADDRESSES)
REFUSED_ADDRESSES = {
    "0.0.0.0/0": {f"{a}.{b}.{c}.{d}/{bits}" for a, b, c, d, bits in V4},
    "2000::/3": {"2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"},
}
assert len(V4) > 15, V4
KUBERNETES = ["1.30", "1.33", "1.37"]
# Kinds of third-party controllers.
FOREIGN = {"ScaledObject": ScaledObject, "TriggerAuthentication": TriggerAuthentication, "PodMonitor": PodMonitor}
DRAIN_PHASES = 4 * 20

CASES = {
    "defaults": {},
    "on the CPU": {"worker": {"gpu": {"count": 0}, "image": {"tag": "cpu"}}},
    "everything": {
        "image": {"digest": "sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "registry"}],
        "publicUrl": "https://pictures.example.com",
        "config": {"quota_pictures_per_minute": 120, "cors_origin": ["https://a.example", "https://b.example"],
                   "provenance": False, "training_share": 0.25},
        "blobs": {"endpoint": "http://s3.storage:9000", "allowHttp": True},
        "api": {"tolerations": [{"operator": "Exists"}], "nodeSelector": {"pool": "web"}, "podAnnotations": {"a": "b"}},
        "worker": {
            "config": {"kv_memory": 24000, "provenance": True},
            "model": {"path": "/models/7b", "volume": {"persistentVolumeClaim": {"claimName": "m", "readOnly": True}}},
            "autoscaling": {"enabled": True, "extraTriggers": [{"type": "cron", "metadata": {}}]},
            "runtimeClassName": "nvidia",
            "affinity": {"nodeAffinity": {}},
        },
        "ingress": {"enabled": True, "className": "nginx", "host": "pictures.example.com", "tlsSecret": "tls",
                    "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "200m"}},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/coar"}},
        "networkPolicy": {
            "apiFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "database": {"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "port": 5432},
            "blobs": {"to": [{"podSelector": {}}], "port": 9000},
        },
        "metrics": {"podMonitor": {"enabled": True, "keySecret": "metrics-key", "labels": {"release": "prometheus"}}},
    },
    "an identity in place of keys": {"blobs": {"existingSecret": ""}, "metrics": {"open": True, "podMonitor": {"enabled": True}}},
    "fixed numbers, no policies": {
        "api": {"autoscaling": {"enabled": False}, "replicas": 3},
        "networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}, "serviceAccount": {"create": False},
    },
}

# Values that must be rejected, each with a word that the error must contain.
REFUSED = {
    "replicaz": {"api": {"replicaz": 3}},
    "existingSecret": {"database": {"existingSecret": ""}},
    "s3://": {"blobs": {"url": "file:///data"}},
    "allowHttp": {"blobs": {"endpoint": "http://s3:9000", "allowHttp": False}},
    "gpu": {"worker": {"gpu": {"count": 2}}},
    "terminationGracePeriodSeconds": {"api": {"terminationGracePeriodSeconds": 30}},
    "database": {"config": {"database": "postgres://user:password@host/db"}},
    "ingress.host": {"ingress": {"enabled": True}},
    "keySecret": {"metrics": {"podMonitor": {"enabled": True}}},
}


def merged(below, above):
    """`above` merged over `below`, as Helm merges values over the chart's own."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {key: merged(below[key], above[key]) if key in below and key in above else above.get(key, below.get(key))
            for key in below | above}


def render(path, values):
    """The rendered objects by kind and name."""
    chart = helm_python.Chart.load(path)
    own = yaml.safe_load(open(f"{path}/values.yaml"))
    chart.validate_schema(merged(own, values))
    objects = {}
    for template, text in chart.render(values, name="coar", namespace="pictures", is_install=True).items():
        if template.endswith("NOTES.txt"):
            continue
        for found in yaml.safe_load_all(text):
            if found:
                key = (found["kind"], found["metadata"]["name"])
                assert key not in objects, f"{key} twice"
                objects[key] = found
    return objects


def unknown(given, known, path=""):
    """Paths in `given` that its model has dropped or changed."""
    if isinstance(given, dict) and isinstance(known, dict):
        return [fault for key in given for fault in unknown(given[key], known.get(key), f"{path}/{key}")]
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        return [fault for place, pair in enumerate(zip(given, known)) for fault in unknown(*pair, f"{path}/{place}")]
    return [] if given == known else [path]


def foreign(found):
    """Faults of an object of a third-party controller."""
    try:
        known = FOREIGN[found["kind"]].model_validate(found).model_dump(by_alias=True, exclude_none=True, mode="json")
    except pydantic.ValidationError as error:
        return [str(error)]
    return [f"unknown: {path}" for path in unknown(found, known)]


def containers(objects):
    """Every pod's spec and its containers, with the object's name."""
    for (kind, name), found in objects.items():
        spec = found["spec"]["template"]["spec"] if kind == "Deployment" else found["spec"] if kind == "Pod" else None
        if spec:
            for container in spec["containers"]:
                yield f"{kind}/{name}", spec, container


def check(case, objects, values):
    """Faults, one per line."""
    faults = []

    def hold(good, what):
        if not good:
            faults.append(f"{case}: {what}")

    for (kind, name), found in objects.items():
        if kind in FOREIGN:
            faults += [f"{case}: {kind}/{name}: {fault}" for fault in foreign(found)]
            continue
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(found, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                hold(False, f"{kind}/{name} under {version}: {error.message} at {list(error.path)}")
    for name, spec, container in containers(objects):
        # The restricted Pod Security Standard, and a read-only root file system.
        pod, own = spec.get("securityContext", {}), container.get("securityContext", {})
        hold(pod.get("runAsNonRoot") is True, f"{name} may run as root")
        hold(pod.get("seccompProfile", {}).get("type") == "RuntimeDefault", f"{name} has no seccomp profile")
        hold(own.get("allowPrivilegeEscalation") is False, f"{name} may gain rights")
        hold(own.get("readOnlyRootFilesystem") is True, f"{name} may write its root file system")
        hold(own.get("capabilities", {}).get("drop") == ["ALL"], f"{name} keeps capabilities")
        hold(spec.get("automountServiceAccountToken") is False, f"{name} has a token of the cluster")
        hold("memory" in container["resources"].get("limits", {}), f"{name} has no limit of memory")
        for variable in container.get("env", []):
            secret = any(word in variable["name"] for word in ("DATABASE", "SECRET", "KEY_ID", "PASSWORD"))
            hold(not secret or "secretKeyRef" in variable.get("valueFrom", {}), f"{name}: {variable['name']} is no reference")
        names = [variable["name"] for variable in container.get("env", [])]
        hold(len(names) == len(set(names)), f"{name} has a variable twice")
    for kind in ("api", "worker"):
        deployment = objects[("Deployment", f"coar-{kind}")]
        template = deployment["spec"]["template"]
        spec, container = template["spec"], template["spec"]["containers"][0]
        labels = template["metadata"]["labels"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            hold(container[probe]["httpGet"]["port"] == "http", f"{kind}: {probe}")
        hold(container["livenessProbe"]["httpGet"]["path"] == "/livez", f"{kind}: the liveness probe waits for the model")
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        hold(spec["terminationGracePeriodSeconds"] > DRAIN_PHASES + pause, f"{kind} is killed while it drains")
        hold(deployment["spec"]["selector"]["matchLabels"].items() <= labels.items(), f"{kind}: the selector misses its pods")
        data = objects[("ConfigMap", f"coar-{kind}")]["data"]
        hold(data["COAR_ROLE"] == kind, f"{kind} has another role")
        hold(all(isinstance(value, str) for value in data.values()), f"{kind}: a setting is no text: {data}")
        scaled = values.get(kind, {}).get("autoscaling", {}).get("enabled", kind == "api")
        hold(("replicas" in deployment["spec"]) != scaled, f"{kind}: replicas beside an autoscaler, or neither")
        policy = objects.get(("NetworkPolicy", f"coar-{kind}"))
        for rule in policy["spec"]["egress"] if policy else []:
            names = all(port["port"] == 53 for port in rule["ports"])
            hold(names or rule.get("to"), f"{kind} reaches {rule['ports']} anywhere")
            for block in (peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer):
                if block["cidr"] in REFUSED_ADDRESSES:
                    missing = REFUSED_ADDRESSES[block["cidr"]] - set(block.get("except", []))
                    hold(not missing, f"{kind} reaches {sorted(missing)}, which the program refuses")
        for other in ("PodDisruptionBudget", "NetworkPolicy"):
            found = objects.get((other, f"coar-{kind}"))
            if found:
                selector = found["spec"].get("selector") or found["spec"]["podSelector"]
                hold(selector["matchLabels"].items() <= labels.items(), f"{other} misses the pods of {kind}")
    worker = objects[("Deployment", "coar-worker")]["spec"]["template"]["spec"]["containers"][0]
    names = [variable["name"] for variable in worker["env"]]
    hold(names.index("POD_IP") < names.index("COAR_ADVERTISE"), "the worker's address is used before it is known")
    gpus = worker["resources"]["limits"].get("nvidia.com/gpu", 0)
    hold(gpus == values.get("worker", {}).get("gpu", {}).get("count", 1), f"{case}: {gpus} GPUs")
    api = objects[("Deployment", "coar-api")]["spec"]["template"]["spec"]["containers"][0]
    hold("nvidia.com/gpu" not in api["resources"].get("limits", {}), "an API process takes a GPU")
    return faults


def everything(objects):
    """The case with every option enabled: its values must appear in the objects."""
    data = objects[("ConfigMap", "coar-worker")]["data"]
    api = objects[("ConfigMap", "coar-api")]["data"]
    expected = {"COAR_QUOTA_PICTURES_PER_MINUTE": "120", "COAR_CORS_ORIGIN": "https://a.example,https://b.example",
                "COAR_TRAINING_SHARE": "0.25", "COAR_KV_MEMORY": "24000", "COAR_PROVENANCE": "on", "COAR_MODEL": "/models/7b"}
    assert {key: data[key] for key in expected} == expected, data
    assert api["COAR_PROVENANCE"] == "off" and "COAR_KV_MEMORY" not in api, api
    image = objects[("Deployment", "coar-api")]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "coar@sha256:" + "0" * 64, image
    scaled = objects[("ScaledObject", "coar-worker")]
    # A fault would be found.
    assert foreign(scaled) == [] and foreign(merged(scaled, {"spec": {"nonsense": 1}})) == ["unknown: /spec/nonsense"]
    triggers = scaled["spec"]["triggers"]
    assert [trigger["type"] for trigger in triggers] == ["postgresql", "postgresql", "cron"], triggers
    for trigger in triggers[:2]:
        metadata = trigger["metadata"]
        assert all(isinstance(value, str) for value in metadata.values()), metadata
        assert set(metadata) == {"query", "targetQueryValue"}, metadata
    # The queries only use tables and columns that the migrations create.
    database = sqlite3.connect(":memory:")
    for migration in sorted(pathlib.Path("migrations/sqlite").glob("*.sql")):
        database.executescript(migration.read_text())
    assert [database.execute(trigger["metadata"]["query"]).fetchall() for trigger in triggers[:2]] == [[(0,)], [(0,)]]
    reference = objects[("TriggerAuthentication", "coar-database")]["spec"]["secretTargetRef"]
    assert reference == [{"parameter": "connection", "name": "coar-database", "key": "url"}], reference
    endpoint = objects[("PodMonitor", "coar")]["spec"]["podMetricsEndpoints"][0]
    assert endpoint["authorization"]["credentials"] == {"name": "metrics-key", "key": "key"}, endpoint
    policy = objects[("NetworkPolicy", "coar-worker")]["spec"]
    assert len(policy["ingress"][0]["from"]) == 2, policy
    assert {"ipBlock": {"cidr": "10.1.2.3/32"}} in policy["egress"][1]["to"], policy
    # Only API processes and the monitoring can reach a worker; callers' API keys are not accepted there.
    assert all("from" in rule for rule in policy["ingress"]), policy


def main(path):
    report = helm_python.lint(path, strict=True)
    found = [message for message in report["messages"] or [] if message["severity"] >= 2] + (report["errors"] or [])
    faults = [f"lint: {message}" for message in found]
    count = 0
    for case, values in CASES.items():
        objects = render(path, values)
        count += len(objects)
        faults += check(case, objects, values)
        if case == "everything":
            everything(objects)
    for word, values in REFUSED.items():
        try:
            render(path, values)
            faults.append(f"values that should be refused for `{word}` are taken")
        except helm_python.HelmError as error:
            if word not in str(error):
                faults.append(f"refused, but not for `{word}`: {error}")
    if faults:
        sys.exit("\n".join(faults))
    print(f"chart: {len(CASES)} sets of values, {count} objects under Kubernetes {', '.join(KUBERNETES)}; "
          f"{len(REFUSED)} bad sets refused")


if __name__ == "__main__":
    main(sys.argv[1])
