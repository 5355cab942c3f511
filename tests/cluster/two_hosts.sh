#!/usr/bin/env bash
# two_hosts.sh COMMAND...   runs COMMAND on "head" of a cluster of two hosts, n1 and n2, made of this machine's namespaces.
#
# Each host has a network of its own behind one bridge, a host name, slurmd and sshd; head has slurmctld and munge. All of
# it ends with COMMAND: /etc and /run are mounted over for these processes only. The hosts share the file system, as
# those of a cluster do. Needs root and the Debian packages that `make test-cluster` installs. CLUSTER names a folder
# for its files: keys, configuration, logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${CLUSTER_INSIDE:-}" ]; then
  CLUSTER=${CLUSTER:-$(mktemp -d)}
  export CLUSTER CLUSTER_INSIDE=1
  exec unshare --mount --net --uts --ipc --pid --fork --mount-proc --kill-child "$here/two_hosts.sh" "$@"
fi

hostname head
mount -t tmpfs run /run
mkdir -p /run/sshd /run/munge /run/netns /run/state /etc/ssh/ssh_config.d
printf '127.0.0.1 localhost\n10.77.0.254 head\n10.77.0.1 n1\n10.77.0.2 n2\n' >/run/hosts
mount --bind /run/hosts /etc/hosts
mount -t tmpfs ssh /etc/ssh/ssh_config.d
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.254/24 dev br0
ip link set br0 up

ssh-keygen -q -t ed25519 -N '' -f "$CLUSTER/id"
ssh-keygen -q -t ed25519 -N '' -f "$CLUSTER/host"
cp "$CLUSTER/id.pub" /run/authorized_keys
cat >/run/sshd_config <<CONFIG
HostKey $CLUSTER/host
AuthorizedKeysFile /run/authorized_keys
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
CONFIG
echo "n1,n2,head,10.77.0.1,10.77.0.2 $(cut -d' ' -f1,2 "$CLUSTER/host.pub")" >/run/known_hosts
cat >/etc/ssh/ssh_config.d/cluster.conf <<CONFIG
Host n1 n2 head
  IdentityFile $CLUSTER/id
  UserKnownHostsFile /run/known_hosts
  BatchMode yes
  LogLevel ERROR
CONFIG

head -c 1024 /dev/urandom >/run/munge.key
chmod 400 /run/munge.key
munged --force --key-file=/run/munge.key --socket=/run/munge/munge.socket.2 --pid-file=/run/munged.pid \
  --log-file=/run/munged.log --seed-file=/run/munged.seed
cp "$here/slurm.conf" "$CLUSTER/"
echo CgroupPlugin=cgroup/v1 >"$CLUSTER/cgroup.conf"
export SLURM_CONF=$CLUSTER/slurm.conf
slurmctld -c
for i in 1 2; do
  ip netns add "n$i"
  ip link add "v$i" type veth peer name eth0 netns "n$i"
  ip link set "v$i" master br0 up
  nsenter "--net=/run/netns/n$i" unshare --uts bash -ec "
    hostname n$i
    ip link set lo up
    ip addr add 10.77.0.$i/24 dev eth0
    ip link set eth0 up
    slurmd
    /usr/sbin/sshd -f /run/sshd_config"
done
for _ in $(seq 100); do
  [ "$(timeout 2 sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && break
  sleep 0.1
done
status=0
"$@" || status=$?
exit $status
