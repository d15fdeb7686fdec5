# shellcheck shell=bash
# Sourced by the scripts beside it: makes the Python environment.

# prepare_environment [REQUIREMENTS...]
# Sets PYTHON to an interpreter with the packages of these files (default requirements.txt). Makes .venv beside this file
# on the first call, and installs again only if a file has changed.
# If PYTHON is set already, as in `PYTHON=python3 ./demo.sh`, that interpreter is used unchanged.
prepare_environment() {
    if [[ -n ${PYTHON:-} ]]; then
        return
    fi
    local root venv file stamp sum i
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    venv=$root/.venv
    if (($# == 0)); then
        set -- requirements.txt
    fi

    local -a changed=() options=() stamps=() sums=()
    for file in "$@"; do
        stamp=$venv/.installed-$(basename "$file").cksum
        sum=$(cd "$root" && cksum <"$file") || return
        if [[ ! -x $venv/bin/python || ! -f $stamp || $(<"$stamp") != "$sum" ]]; then
            changed+=("$file") options+=(-r "$file") stamps+=("$stamp") sums+=("$sum")
        fi
    done

    if ((${#changed[@]})); then
        # An environment without pip was interrupted while it was made.
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            make_environment "$venv" || return
        fi
        echo "Installing ${changed[*]} into .venv: this takes minutes the first time" >&2
        (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${options[@]}") || return
        for i in "${!stamps[@]}"; do
            echo "${sums[i]}" >"${stamps[i]}"
        done
    fi
    PYTHON=$venv/bin/python
}

make_environment() {
    if ! command -v python3 >/dev/null; then
        echo "python3 is missing: install Python 3.11 or later" >&2
        return 2
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "python3 is $(python3 --version): Python 3.11 or later is needed" >&2
        return 2
    fi
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        echo "python3 cannot make virtual environments here: apt install python3-venv" >&2
        return 2
    fi
    python3 -m venv --clear "$1"
}
