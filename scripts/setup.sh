#!/usr/bin/env bash
# Prepares a checkout: system packages that are missing, and a virtual environment with trio-vmm installed in it.
#
#   scripts/setup.sh            everything that building, the tests, the benchmarks and the lint need
#   scripts/setup.sh --minimal  only what building and running trio-vmm need
#
# Says which packages it is about to install and what for, installs those alone, with sudo where it is not root, and
# does nothing at all the second time. For Debian 12 and Ubuntu 24.04; elsewhere it names what is missing.
# VENV (default .venv) is the virtual environment, PYTHON (default python3) the interpreter that it is made with.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
python=${PYTHON:-python3}
minimal=0
case ${1:-} in
  '') ;;
  --minimal) minimal=1 ;;
  *) echo "usage: scripts/setup.sh [--minimal]" >&2; exit 2 ;;
esac

die() { echo "setup: $*" >&2; exit 1; }

missing=() reasons=()
want() { missing+=("$1"); reasons+=("$2"); }
# wanted unless PACKAGE is installed
package() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q '^install ok installed' || want "$1" "$2"; }
# wanted unless COMMAND can be run, whoever installed it
command_of() { command -v "$1" >/dev/null || want "$2" "$3"; }
# wanted unless the file is there
file_of() { [[ -e $1 ]] || want "$2" "$3"; }

command_of "$python" python3 "runs it all; 3.11 or later"
if command -v "$python" >/dev/null; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "Python 3.11 or later is needed, $(command -v "$python") is $("$python" -V 2>&1 | cut -d' ' -f2): name another one in PYTHON"
  "$python" -c 'import ensurepip, venv' 2>/dev/null || want python3-venv "makes the virtual environment"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  file_of "$header" python3-dev "Python.h, to compile the KVM binding"
else
  want python3-venv "makes the virtual environment"
  want python3-dev "Python.h, to compile the KVM binding"
fi
command_of gcc gcc "compiles the KVM binding and the built-in guests"
file_of /usr/include/stdio.h libc6-dev "the C library's headers"
file_of /usr/include/linux/kvm.h linux-libc-dev "linux/kvm.h"
command_of make make "runs the Makefile"
if ((!minimal)); then
  command_of qemu-system-x86_64 qemu-system-x86 "emulates the machine of the box for stock Linux guests; other side of the benchmarks"
  [[ -x /usr/lib/qemu/virtiofsd || -x /usr/libexec/virtiofsd || -x /usr/lib/virtiofsd ]] || {
    # Part of qemu-system-common in Debian 12, a package of its own later.
    if grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release
    then want qemu-system-common "serves this machine's files to the box"
    else want virtiofsd "serves this machine's files to the box"; fi
  }
  command_of nasm nasm "assembles the tests' tiny guests"
  command_of zstd zstd "unpacks the box's kernel"
  command_of xz xz-utils "unpacks the packages of guests"
  command_of openssl openssl "makes certificates for the tests of TLS"
  command_of ip iproute2 "makes the network on which the box's tests lose packets"
  command_of shellcheck shellcheck "lint of the shell scripts"
fi

as_root() {
  if ((EUID == 0)); then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "this needs root and there is no sudo; run as root: $*"; fi
}
update_apt() {
  echo "setup: reading apt's package lists"
  as_root apt-get update -q >/dev/null || die "apt-get update failed (above)"
}

updated=0
if ((${#missing[@]})); then
  echo "setup: these system packages are missing:"
  for i in "${!missing[@]}"; do printf '  %-20s %s\n' "${missing[i]}" "${reasons[i]}"; done
  command -v apt-get >/dev/null || die "no apt-get here: install them, or what they are called here, by hand and run this again"
  update_apt
  updated=1
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" \
    || die "apt-get could not install: ${missing[*]} (above)"
fi
# The tests download their kernel with apt, which a new machine's empty package lists would not let them.
if ((!minimal && !updated)) && command -v apt-cache >/dev/null; then
  apt-cache show linux-image-6.12-cloud-amd64 >/dev/null 2>&1 || apt-cache show linux-image-virtual >/dev/null 2>&1 || update_apt
fi

extra=''
((minimal)) || extra='[dev]'
if [[ ! -x $venv/bin/python ]]; then
  echo "setup: making the virtual environment $venv"
  "$python" -m venv "$venv"
fi
# Installed again only when what is installed, or into what, has changed. Sources in C are `make compile`'s business.
state=$({ cat pyproject.toml setup.py scripts/setup.sh; "$venv/bin/python" -V; pwd; echo "$extra"; } | sha256sum)
if [[ $(cat "$venv/installed" 2>/dev/null) != "$state" ]]; then
  echo "setup: installing trio-vmm$extra into $venv"
  # setuptools too, since `make compile` builds outside pip, and a virtual environment has an old one or none.
  "$venv/bin/python" -m pip install -q --disable-pip-version-check -e ".$extra" 'setuptools>=69'
  echo "$state" >"$venv/installed"
fi

if [[ ! -e /dev/kvm ]]; then
  echo "setup: note: /dev/kvm is not there, so no machine can run: load the kvm module, or turn virtualization on"
elif [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
  echo "setup: note: $(id -un) may not open /dev/kvm: add the user to group $(stat -c %G /dev/kvm), and log in again"
fi
