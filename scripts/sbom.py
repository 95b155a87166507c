"""Completes cargo's bill of materials with what cargo does not know of: `python sbom.py BOM REQUIREMENTS > COMPLETE`.

The libraries that scripts/install-libtorch.sh fetches, with the versions that REQUIREMENTS pins, are added,
and the program depends on them.
"""

import json
import os
import re
import sys

# Replaces the path of the build folder, so the output is the same in every folder.
bom = json.loads(open(sys.argv[1]).read().replace(f"file://{os.getcwd()}", "file:///coar"))
requirements = open(sys.argv[2]).read()
pinned = dict(re.findall(r"^(torch|nvidia-[a-z-]+)==([0-9.]+)", requirements, re.MULTILINE))
licences = {"torch": {"license": {"id": "BSD-3-Clause"}}}
proprietary = {"license": {"name": "NVIDIA CUDA Toolkit End User License Agreement"}}
root = bom["metadata"]["component"]["bom-ref"]
edges = next(entry for entry in bom["dependencies"] if entry["ref"] == root)
for name, pin in pinned.items():
    purl = f"pkg:pypi/{name}@{pin}"
    component = {"type": "library", "bom-ref": purl, "name": name, "version": pin, "purl": purl, "scope": "required"}
    component["licenses"] = [licences.get(name, proprietary)]
    bom["components"].append(component)
    bom["dependencies"].append({"ref": purl})
    edges.setdefault("dependsOn", []).append(purl)
json.dump(bom, sys.stdout, indent=2)
