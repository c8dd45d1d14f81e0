//! Limits of this process: its memory, and how many connections fit into it.

use std::{fs, path::Path};

use seawall_proto::memory::reserve;

use crate::runtime::{
    config::{Config, Limits},
    memory::{Group, machine_bytes},
};

/// Lower bound of the memory of a connection, in bytes, kernel included. It bounds the number of connections, from
/// which the shares of addresses are computed. [`crate::runtime::memory`] measures how many really fit.
const CONNECTION_BYTES: u64 = 4 * 1024;
/// Share of the memory for connections, in percent. The rest is for databases, rules, slots and everything else.
const CONNECTIONS_PERCENT: u64 = 80;
/// Maximum memory of a running handshake, in bytes, kernel included. Measured: 25 KB over TLS, by the test
/// `an_unfinished_tls_handshake_holds_no_more_than_its_bound`.
const HANDSHAKE_BYTES: u64 = 32 * 1024;
/// The same with client certificates, whose chain is part of it. Measured: 65 KB.
const CERTIFIED_HANDSHAKE_BYTES: u64 = 72 * 1024;
/// Maximum number of parked handshakes for each permit: 4,000 with 500 permits. Those that have sent nothing are not
/// included, unless memory is short.
pub const PARKED_PER_PERMIT: usize = 8;
/// Minimum number of handshake permits on any machine.
const HANDSHAKES_MIN: usize = 8;
/// Minimum number of connections on any machine.
const CONNECTIONS_MIN: u64 = 64;

/// Replaces the limits "as many as memory allows" with numbers. The listener asks for open files.
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

/// Number of handshakes that fit, with the parked ones, into the memory that a full node keeps free.
fn handshakes(memory: u64, handshake_bytes: u64) -> usize {
    let each = handshake_bytes * (1 + PARKED_PER_PERMIT as u64);
    usize::try_from(reserve(memory) / each)
        .unwrap_or(usize::MAX)
        .max(HANDSHAKES_MIN)
}

fn connections(memory: u64) -> usize {
    let fitting = memory / 100 * CONNECTIONS_PERCENT / CONNECTION_BYTES;
    usize::try_from(fitting.max(CONNECTIONS_MIN)).unwrap_or(usize::MAX)
}

/// Memory for this process, in bytes: the minimum of the machine's memory and the limits of its cgroups (version 2 or
/// 1).
#[must_use]
pub fn available() -> u64 {
    let machine = machine_bytes();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Group::around(&groups, Path::new("/sys/fs/cgroup"))
        .iter()
        .filter_map(|group| group.limit(machine))
        .fold(machine, u64::min)
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
