#!/bin/bash
# The first process of a host. It mounts the host's own /run, /dev/shm and /tmp and its files of /etc, and starts its
# daemons. Arguments: the cluster's folder, the host's name, and the Slurm daemon to run (slurmctld or slurmd).
# Everything is mounted in the host's own mount namespace, and so disappears with it.
set -eu
folder=$1 name=$2 daemon=$3

hostname "$name"
mount --make-rprivate /
for where in /run /dev/shm "$folder/local"; do mount -t tmpfs -o size=2g tmpfs "$where"; done
mkdir -p -m 755 /run/sshd /run/munge /run/slurm
mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc/slurm" /etc/slurm
mount --bind "$folder/etc/ssh" /etc/ssh

# The network card is plugged in from outside.
until ip -4 -oneline address show dev eth0 2>/dev/null | grep -q inet; do sleep 0.05; done

/usr/sbin/sshd -E "$folder/log/$name.sshd.log"
install -m 400 "$folder/munge.key" /run/munge/key
/usr/sbin/munged --key-file=/run/munge/key --log-file=/run/munge/log --seed-file=/run/munge/seed --num-threads=2
"/usr/sbin/$daemon"

trap 'exit 0' TERM
while :; do sleep 3600 & wait $! || true; done # bash as process 1 reaps orphans
