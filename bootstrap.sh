#!/usr/bin/env bash
# A fresh machine -> a working dsft in .venv, then one of two things:
#   ./bootstrap.sh quickstart [options of `dsft quickstart`]
#   ./bootstrap.sh test [options of pytest]
# Running it again is quick: a finished set-up is kept. PYTHON names another interpreter, DSFT_VENV another folder.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
goal=${1:-}
case $goal in
  quickstart | test) shift ;;
  *) echo "usage: $0 quickstart|test [options]" >&2; exit 2 ;;
esac
venv=${DSFT_VENV:-$here/.venv}
log=$venv.log

fail() { printf '%s\n' "bootstrap: $1" "  -> $2" >&2; exit 1; }

# step WHAT ADVICE COMMAND...: one line on the terminal, the command's output in the log.
step() {
  local what=$1 advice=$2 start=$SECONDS
  shift 2
  printf '%s ... ' "$what"
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    printf 'failed\n'
    tail -n 15 "$log" >&2
    fail "$what failed; the whole output is in $log" "$advice"
  fi
  printf '%s s\n' "$((SECONDS - start))"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=${PYTHON:-}
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  if new_enough "$candidate"; then python=$candidate; break; fi
done
new_enough "${python:-no-python}" ||
  fail "no Python 3.11 or newer found" "install one (Debian: apt-get install python3 python3-venv), or set PYTHON=/path/to/python3.11"

# The set-up is whole only when its stamp, written last, matches what it was made from.
wanted=$(cat setup.py constraints.txt bootstrap.sh <(echo "$here" && "$python" -c 'import sys; print(sys.version, sys.base_prefix)') | sha256sum)
if [ "$(cat "$venv/dsft-stamp" 2>/dev/null)" != "$wanted" ]; then
  mkdir -p "$(dirname "$venv")"
  : >"$log"
  step "virtual environment in $venv" "Debian: apt-get install python3-venv" "$python" -m venv --clear "$venv"
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt)
  network="check the network and the disk (df -h .), then run this command again; behind a mirror, set it in pip's configuration"
  # an old pip can need many minutes to resolve this set; seqeval, a source package, asks setuptools-scm for its version
  step "pip and setuptools" "$network" "${pip[@]}" -U pip setuptools setuptools-scm wheel
  step "torch" "$network" "${pip[@]}" torch
  extras='test'
  if command -v nvidia-smi >/dev/null; then extras='test,gpu'; fi
  # deepspeed is built from source: no ops ahead of time, and against the torch just installed
  step "dsft and its dependencies" "$network" env DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation -e ".[$extras]"
  printf '%s\n' "$wanted" >"$venv/dsft-stamp"
  echo "set up; to use dsft in your shell: source $venv/bin/activate"
fi

export PATH=$venv/bin:$PATH
case $goal in
  quickstart) exec "$venv/bin/dsft" quickstart "$@" ;;
  test) exec "$venv/bin/python" -m pytest "$@" ;;
esac
