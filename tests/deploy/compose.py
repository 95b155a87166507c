"""Checks properties of docker/compose.yaml, the dashboard, the alerts and their parts that schemas cannot express:
`python compose.py ROOT WORK`.

Writes WORK/rules.yml, every expression of the dashboard as a rule, for promtool. Exits with 1 and a list of faults if a check
fails.
"""

import json
import pathlib
import re
import sys

import yaml

root, work = map(pathlib.Path, sys.argv[1:])
faults = []


def hold(good, what):
    if not good:
        faults.append(what)


text = (root / "docker/compose.yaml").read_text()
compose = yaml.safe_load(text)
services = compose["services"]
for name, service in services.items():
    hold(service.get("read_only") is True, f"{name}: the root file system may be written")
    hold(service.get("cap_drop") == ["ALL"] and "cap_add" not in service, f"{name} keeps capabilities")
    hold("no-new-privileges:true" in service.get("security_opt", []), f"{name} may gain rights")
    hold(not service.get("privileged"), f"{name} is privileged")
    hold("mem_limit" in service and "pids_limit" in service, f"{name} may take all memory or all processes of the machine")
    image = service["image"]
    hold(":" in image and not image.endswith(":latest"), f"{name}: {image} is not pinned")
    ours = image.startswith("coar:")
    hold(ours or name == "bucket" or "healthcheck" in service, f"{name} has no health check")
    for port in service.get("ports", []):
        hold(port.startswith("127.0.0.1:"), f"{name}: {port} is open to everybody")
    for volume in service.get("volumes", []):
        source, target, *mode = volume.rsplit(":", 2) if volume.endswith((":ro", ":rw")) else volume.rsplit(":", 1)
        if source.startswith("./"):
            hold((root / "docker" / source).exists(), f"{name}: {source} does not exist")
            hold(mode == ["ro"], f"{name}: {source} may be written")
        elif not source.startswith("$"):
            hold(source in compose["volumes"], f"{name}: no volume {source}")
    for network in service.get("networks", []):
        hold(network in compose["networks"], f"{name}: no network {network}")
    for other, how in service.get("depends_on", {}).items():
        hold(other in services, f"{name} waits for {other}, which is not there")
        done = how["condition"] == "service_completed_successfully"
        hold(done == (services[other].get("restart") == "no"), f"{name} waits for {other} in vain")
for name in ("postgres", "s3"):
    hold(services[name]["networks"] == ["state"] and compose["networks"]["state"]["internal"], f"{name} is reached from outside")
for name in ("api", "worker", "worker-gpu"):
    grace = int(services[name]["stop_grace_period"].rstrip("s"))
    hold(grace > 80, f"{name} is killed while it drains")

# Every COAR_ variable must be one that the program reads.
known = set()
for path in (*(root / "src").rglob("*.rs"), *(root / "crates").glob("*/src/**/*.rs")):
    known |= set(re.findall(r'"(COAR_[A-Z_]+)"', path.read_text()))
told = {key for service in services.values() for key in service.get("environment", {}) if key.startswith("COAR_")}
told |= set(re.findall(r"COAR_[A-Z_]+(?==)", " ".join(str(service.get("entrypoint", "")) for service in services.values())))
told |= set(re.findall(r"\b(COAR_[A-Z_]+)=", (root / "docker/Dockerfile").read_text())) - {"COAR_LIBTORCH_CACHE"}
for path in (root / "docker/helm/coar/templates").glob("*"):
    if path.is_file():
        told |= set(re.findall(r"\b(COAR_[A-Z_]+[A-Z])\b", path.read_text()))
missing = sorted(told - known)
hold(not missing, f"the program has no {', '.join(missing)}")

# docker/env.sh must create every variable that the compose file requires.
made = set(re.findall(r'echo "([A-Z0-9_]+)=', (root / "docker/env.sh").read_text()))
demanded = set(re.findall(r"\$\{([A-Z0-9_]+):\?", text))
hold(made == demanded, f"docker/env.sh makes {sorted(made)}, the compose file demands {sorted(demanded)}")

# Metrics: those of crates/coar-core/src/metrics.rs and no others.
meters = (root / "crates/coar-core/src/metrics.rs").read_text()
names = set(re.findall(r'metric\(\s*"(coar_\w+)"', meters))
hold(len(names) > 30, f"only {len(names)} metrics were found in metrics.rs")


def metrics(expression):
    found = set(re.findall(r"\bcoar_\w+", expression))
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in names else name for name in found}


dashboard = json.loads((root / "docker/grafana-dashboard.json").read_text())
expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
hold(len(expressions) > 30, f"only {len(expressions)} expressions in the dashboard")
shown = set().union(*map(metrics, expressions))
hold(shown <= names, f"the dashboard shows metrics that are not there: {sorted(shown - names)}")
alerts = yaml.safe_load((root / "docker/alerts.yml").read_text())
asked = set().union(*(metrics(rule["expr"]) for group in alerts["groups"] for rule in group["rules"]))
hold(asked <= names, f"alarms ask for metrics that are not there: {sorted(asked - names)}")
ids = [panel["id"] for panel in dashboard["panels"]]
hold(len(ids) == len(set(ids)), "two panels of the dashboard have one id")
# The files and tests that the threat model names must exist.
model = (root / "docs/explanation/threat-model.md").read_text()
cited = set(re.findall(r"`((?:src|crates|tests|docker)/[\w./-]+(?:::\w+)?)`", model))
for citation in sorted(cited):
    path, _, test = citation.partition("::")
    hold((root / path).exists(), f"the threat model names {path}, which is not there")
    if test and (root / path).exists():
        hold(f"fn {test}(" in (root / path).read_text(), f"the threat model names {citation}, which is not there")
hold(len(cited) > 50, f"only {len(cited)} places are named in the threat model")
provisioned = yaml.safe_load((root / "docker/grafana/dashboards.yaml").read_text())["providers"][0]["options"]["path"]
hold(any(volume.split(":")[1].startswith(provisioned + "/") for volume in services["grafana"]["volumes"]), "Grafana finds no dashboard")

plain = [expression.replace("$__rate_interval", "5m").replace("$__interval", "5m").replace("$instance", ".*") for expression in expressions]
rules = [{"record": f"dashboard:{number}", "expr": expression} for number, expression in enumerate(plain)]
(work / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

if faults:
    sys.exit("\n".join(faults))
print(f"compose: {len(services)} services; dashboard: {len(expressions)} expressions over {len(shown)} of {len(names)} metrics; "
      f"{len(asked)} metrics in alarms; threat model: {len(cited)} files and tests")
