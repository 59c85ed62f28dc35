# Sourced by check.sh and launch/*.sh: makes .venv at the repository's root and installs the package into it.
# Re-used when present and complete; safe to interrupt: the stamp is written last, after a whole installation.
#   prepare_venv EXTRAS...    e.g. prepare_venv dev

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
  stamp=.venv/.installed-${extras:-base}
  wanted=$(cksum setup.py | cut -d' ' -f1)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv (${extras:-no extras}) ..."
    [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
  fi
}
