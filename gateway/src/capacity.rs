//! How much this process may hold: memory, and how many connections fit into it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::config::{Limits, Server};

/// Memory that one connection may take, in bytes: an idle one takes about 3 KiB, one that carries messages grows up to its frame buffers.
const CONNECTION_BYTES: u64 = 16 * 1024;
/// Share of the memory that connections may take, in percent: the rest is for databases, rules, slots and what else there is.
const CONNECTIONS_PERCENT: u64 = 60;
/// Fewest connections, however small the machine.
const CONNECTIONS_MIN: u64 = 64;

/// The settings of limits with "as many as memory allows" made a figure. Open files are the listener's to ask for.
#[must_use]
pub fn sized(limits: &Limits, server: &Server) -> Limits {
    let mut limits = limits.clone();
    if limits.connections_max == 0 {
        let memory = if server.max_memory_bytes == 0 {
            available()
        } else {
            server.max_memory_bytes
        };
        limits.connections_max = connections(memory);
    }
    limits
}

fn connections(memory: u64) -> usize {
    let fitting = memory / 100 * CONNECTIONS_PERCENT / CONNECTION_BYTES;
    usize::try_from(fitting.max(CONNECTIONS_MIN)).unwrap_or(usize::MAX)
}

/// The least of what the machine has and what this process's cgroup and those around it allow (version 2 or 1), in bytes.
#[must_use]
pub fn available() -> u64 {
    let machine = rustix::system::sysinfo();
    let total = machine.totalram.saturating_mul(u64::from(machine.mem_unit));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limit_files(&groups)
        .iter()
        .filter_map(|path| figure(path))
        .fold(total, u64::min)
}

/// Files that may hold a limit for a process of these cgroups: its own group's and those of all groups around it.
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        let group = Path::new(group.trim_start_matches('/'));
        files.extend(group.ancestors().map(|group| Path::new(root).join(group).join(name)));
    }
    files
}

/// `max` means no limit.
fn figure(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_memory_unless_configured() {
        let server = Server {
            max_memory_bytes: 1 << 30,
            ..Server::default()
        };

        let by_memory = sized(&Limits::default(), &server);
        let configured = sized(
            &Limits {
                connections_max: 5,
                ..Limits::default()
            },
            &server,
        );

        assert_eq!(by_memory.connections_max, 39_321);
        assert_eq!(configured.connections_max, 5);
        assert_eq!(connections(0), 64);
        assert!(available() > 0);
    }

    #[test]
    fn limits_of_groups_around_count() {
        let files = limit_files("12:cpu,cpuacct:/x\n4:memory:/docker/a\n0::/system.slice/seawall.service\n");

        let files: Vec<_> = files.iter().map(|file| file.to_str().unwrap()).collect();
        assert_eq!(
            files,
            [
                "/sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                "/sys/fs/cgroup/system.slice/seawall.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/memory.max",
            ]
        );
    }
}
