# Sourced by the programs in tools/: what they need from the machine, and one build environment for all of them.
# The variables of use_build_environment are part of every compiled object's key: changing one builds RocksDB again
# (half an hour of CPU time), on every machine.
# shellcheck shell=bash

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '== %s\n' "$*"; }
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# need_packages PACKAGE...: installs those that are missing; without root or sudo says what to install.
need_packages() {
    if ! command -v dpkg-query >/dev/null; then
        say "no Debian: taking for granted what these packages have: $*"
        return
    fi
    local missing=() package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]} > 0)) || return 0
    local as_root=()
    if ((EUID != 0)); then
        local ask=()
        # Nobody can type a password where there is no terminal.
        [[ -t 0 && -t 2 ]] || ask=(-n)
        if ! command -v sudo >/dev/null || ! sudo "${ask[@]}" true; then
            fail "packages are missing, and installing them needs root: apt-get install ${missing[*]}"
        fi
        as_root=(sudo "${ask[@]}")
    fi
    say "installing ${missing[*]}"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
    local log
    log=$(mktemp)
    # The list of packages may be old, or missing on a fresh machine.
    if ! "${apt[@]}" install --no-install-recommends "${missing[@]}" >"$log" 2>&1 </dev/null &&
        ! { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        fail "apt-get could not install ${missing[*]}"
    fi
    rm -f "$log"
}

# use_build_environment: the compiler, its cache and the target directory, outside the clone so that clones share them.
use_build_environment() {
    [[ -n ${HOME:-} ]] || fail "HOME is not set"
    command -v cargo >/dev/null || PATH=$HOME/.cargo/bin:$PATH
    command -v cargo >/dev/null || fail "cargo is missing: install Rust as https://rustup.rs says, then run this again"
    export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/blockferry/target}
    export CC="ccache gcc" CXX="ccache g++" CCACHE_DIR=$HOME/.cache/blockferry/ccache CCACHE_MAXSIZE=5G
    mkdir -p "$CARGO_TARGET_DIR" "$CCACHE_DIR"
    cd "$root"
}

build_packages=(build-essential libclang-dev ccache)
image_packages=(e2fsprogs)
# libnbd-bin has nbdinfo, nbdcopy and nbdfuse; python3-libnbd has nbdsh.
# openssl makes certificates as docs/nbd.md says.
nbd_packages=(qemu-utils libnbd-bin python3-libnbd nbdkit fio fuse3 mount openssl)

# warn_of_first_build PROFILE_DIRECTORY: nobody likes to wait without knowing for what.
warn_of_first_build() {
    compgen -G "$CARGO_TARGET_DIR/$1/build/librocksdb-sys-*/out/librocksdb.a" >/dev/null ||
        say "the first build compiles RocksDB: about 20 minutes on 2 cores, once on this machine"
}
