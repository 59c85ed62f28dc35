# Sourced by check.sh, .ci/run and launch/*.sh: creates .venv in the root of the repository and installs the package.
# An installation that is complete is used again. It is safe to interrupt: the stamp is written last.
#   prepare_venv EXTRAS...    for example: prepare_venv dev
#   machine                   prints tpu, cuda or cpu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

prepare_venv() {
  local python extras stamp wanted
  for python in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 || continue
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    python=""
  done
  if [ -z "${python:-}" ]; then
    echo "spatial_jax needs Python 3.11 or newer; install it, or name it: PYTHON=/path/to/python3.11 $0" >&2
    exit 2
  fi
  extras=$(IFS=,; echo "$*")
  stamp="$root/.venv/.installed-${extras:-base}"
  wanted=$(cksum "$root/setup.py" | cut -d' ' -f1)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $root/.venv (${extras:-no extras}) ..." >&2
    "$root/.venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
  fi
}

machine() {
  local system="${1:-}"  # another root of the file system, for tests
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then
    echo cuda
  elif compgen -G "$system/dev/accel*" >/dev/null; then
    echo tpu
  # Newer TPUs are passed through by VFIO; so are other devices, but not those of Google (0x1ae0).
  elif compgen -G "$system/dev/vfio/[0-9]*" >/dev/null && grep -qs 0x1ae0 "$system"/sys/bus/pci/devices/*/vendor; then
    echo tpu
  else
    echo cpu
  fi
}
