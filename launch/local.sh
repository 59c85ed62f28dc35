#!/usr/bin/env bash
# Trains the embedded policy with AP-GRPO on this machine, evaluates it, and writes runs/tiny/report.html.
# Installs what it needs into .venv. Stop it at any time; the same command goes on where it was.
#   ./launch/local.sh                              the default run
#   ./launch/local.sh --config=configs/NAME.py --workdir=runs/NAME [--config.seed=1 ...]
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" --help "* | *" -h "*) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
. launch/setup.sh
prepare_venv

arguments=("$@")
case " $* " in *" --config="*) ;; *) arguments=(--config=configs/tiny.py "${arguments[@]}") ;; esac
case " $* " in *" --workdir="*) ;; *) arguments+=(--workdir=runs/tiny) ;; esac

# Without an accelerator say so: a TPU library that happens to be installed would look for its chips.
if ! command -v nvidia-smi >/dev/null 2>&1 && ! compgen -G "/dev/accel*" >/dev/null && [ ! -e /dev/vfio/0 ]; then
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
fi
# On a CPU, large temporaries in huge pages: without them page faults cost a sixth of an update (glibc alone reads this).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec .venv/bin/python -m spatial_jax.train "${arguments[@]}"
