#!/usr/bin/env bash
# Trains the embedded policy with AP-GRPO on this machine, evaluates it, and writes runs/tiny/report.html.
# The first call installs the package into .venv of the repository, with the JAX of this machine: TPU, NVIDIA GPU or CPU.
# Stop it at any time; the same command resumes. Paths are relative to the current directory.
#   launch/local.sh                                                        the default run
#   launch/local.sh --config=configs/NAME.py --workdir=runs/NAME           another one
#   launch/local.sh --workdir=runs/long --config.loop.steps=200            with other values: all keys are in configs/common.py
#   launch/local.sh --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
case " $* " in *" --help "* | *" -h "*) sed -n '2,8s/^# \{0,1\}//p' "$root/launch/local.sh"; exit 0 ;; esac

machine=$(machine)
if [ "$machine" = cpu ]; then
  prepare_venv
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"  # a TPU library may be installed, and would search for its chips
  # Large temporaries in huge pages: without them page faults cost a sixth of an update (only glibc reads it).
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
else
  prepare_venv "$machine"
fi

case " $* " in *" --config="*) ;; *) set -- "--config=$root/configs/tiny.py" "$@" ;; esac
case " $* " in *" --workdir="*) ;; *) set -- "$@" --workdir=runs/tiny ;; esac
exec "$root/.venv/bin/python" -m spatial_jax.train "$@"
