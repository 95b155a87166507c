"""Prints a service's entry point in docker/compose.yaml as the container engine receives it, with a NUL after each part:
`entrypoint.py SERVICE`."""

import sys

import yaml

parts = yaml.safe_load(open("docker/compose.yaml"))["services"][sys.argv[1]]["entrypoint"]
sys.stdout.write("".join(part.replace("$$", "$") + "\0" for part in parts))
