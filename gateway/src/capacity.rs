//! How much this process may hold: memory, and how many connections fit into it.

use std::{fs, path::Path};

use seawall_proto::memory::reserve;

use crate::{
    config::{Config, Limits},
    door::ASIDE_PER_PLACE,
    memory::Group,
};

/// Less than any connection takes, in bytes, kernel included: more than memory divided by this is never possible, and shares by address are reckoned from
/// it. What really fits is measured ([`crate::memory`]).
const CONNECTION_BYTES: u64 = 4 * 1024;
/// Share of the memory that connections may take, in percent: the rest is for databases, rules, slots and what else there is.
const CONNECTIONS_PERCENT: u64 = 80;
/// The most that a handshake under way takes, in bytes, kernel included (measured: 25 KB over TLS, test
/// `an_unfinished_tls_handshake_holds_no_more_than_its_bound`).
const HANDSHAKE_BYTES: u64 = 32 * 1024;
/// The same where client certificates are asked for, whose chain is part of it (measured: 65 KB).
const CERTIFIED_HANDSHAKE_BYTES: u64 = 72 * 1024;
/// Fewest places for handshakes, however small the machine.
const HANDSHAKES_MIN: usize = 8;
/// Fewest connections, however small the machine.
const CONNECTIONS_MIN: u64 = 64;

/// The settings of limits with "as many as memory allows" made a figure. Open files are the listener's to ask for.
#[must_use]
pub fn sized(config: &Config) -> Limits {
    let memory = match config.server.max_memory_bytes {
        0 => available(),
        configured => configured.min(available()),
    };
    let handshake_bytes = match config.tls.client_ca {
        Some(_) => CERTIFIED_HANDSHAKE_BYTES,
        None => HANDSHAKE_BYTES,
    };
    let mut limits = config.limits.clone();
    if limits.connections_max == 0 {
        limits.connections_max = connections(memory);
    }
    limits.handshakes_max = limits.handshakes_max.min(handshakes(memory, handshake_bytes));
    limits
}

/// So many that all of them, and those that stand aside, fit into what a node that is full has left.
fn handshakes(memory: u64, handshake_bytes: u64) -> usize {
    let each = handshake_bytes * (1 + ASIDE_PER_PLACE as u64);
    usize::try_from(reserve(memory) / each)
        .unwrap_or(usize::MAX)
        .max(HANDSHAKES_MIN)
}

fn connections(memory: u64) -> usize {
    let fitting = memory / 100 * CONNECTIONS_PERCENT / CONNECTION_BYTES;
    usize::try_from(fitting.max(CONNECTIONS_MIN)).unwrap_or(usize::MAX)
}

/// The least of what the machine has and what this process's cgroup and those around it allow (version 2 or 1), in bytes.
#[must_use]
pub fn available() -> u64 {
    let machine = of_machine();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Group::around(&groups, Path::new("/sys/fs/cgroup"))
        .iter()
        .filter_map(|group| group.limit(machine))
        .fold(machine, u64::min)
}

/// What the machine has, in bytes.
#[must_use]
pub fn of_machine() -> u64 {
    let machine = rustix::system::sysinfo();
    machine.totalram.saturating_mul(u64::from(machine.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_memory_unless_configured() {
        let mut config = Config::default();
        config.server.max_memory_bytes = 1 << 30;

        let by_memory = sized(&config);
        config.tls.client_ca = Some("ca.pem".into());
        let certified = sized(&config);
        config.limits.connections_max = 5;
        let configured = sized(&config);

        assert_eq!(by_memory.connections_max, 209_715);
        assert_eq!(configured.connections_max, 5);
        assert_eq!(connections(0), 64);
        assert_eq!(by_memory.handshakes_max, 364);
        assert_eq!(certified.handshakes_max, 161);
        let handshakes = |memory| handshakes(memory, HANDSHAKE_BYTES);
        assert_eq!((handshakes(128 << 20), handshakes(0)), (85, 8));
        assert!(available() > 0);
    }
}
