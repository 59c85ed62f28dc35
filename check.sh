#!/usr/bin/env bash
# The test command: format, lint, types, tests. Installs everything into .venv.
#   ./check.sh           what every change must pass (at most 15 minutes on two cores)
#   ./check.sh --all     also the slow tests, and live parity against transformers on torch's CPU build
set -euo pipefail
cd "$(dirname "$0")"
. launch/setup.sh

markers="not slow"
case "${1:-}" in
  "") ;;
  --all) markers="" ;;
  *) sed -n '2,4s/^# *//p' "$0"; exit 2 ;;
esac

prepare_venv dev
if [ -z "$markers" ]; then prepare_venv dev bench; fi
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
basedpyright
python -m pytest -n 2 --dist loadfile ${markers:+-m "$markers"} --durations=10
