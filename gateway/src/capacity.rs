//! How much this process may hold: memory, and how many connections fit into it.

use std::{fs, path::Path};

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

/// The least of what the cgroup (version 2 or 1) and the machine allow, in bytes.
#[must_use]
pub fn available() -> u64 {
    let machine = rustix::system::sysinfo();
    let total = (machine.totalram as u64).saturating_mul(u64::from(machine.mem_unit));
    let groups = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    groups
        .iter()
        .filter_map(|path| figure(Path::new(path)))
        .fold(total, u64::min)
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
}
