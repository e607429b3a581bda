#!/usr/bin/env bash
# Installs the Debian packages of the tests that need real parts: bash tests/install_system.sh
#
# Slurm, ssh, strace, faketime, libaio and a Docker engine. Needs root and apt-get; quick where everything is there
# already. Without it those tests are skipped, saying why.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

PACKAGES=(
    # tests/cluster
    slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2
    # faults at system calls, another clock
    strace faketime
    # an optimizer on NVMe
    libaio-dev
    # a Docker engine, and what makes a base image without a registry
    docker.io debootstrap docker-compose
)

missing=()
for package in "${PACKAGES[@]}"; do
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
        missing+=("$package")
    fi
done
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "tests/install_system.sh: not root, so these are not installed: ${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Tests start the daemons they need themselves; the machine is to run none.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends "${missing[@]}"
