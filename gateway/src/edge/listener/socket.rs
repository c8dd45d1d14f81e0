//! The socket of the device listener: its options, its backlog, sharing its address, and the limits of the process.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
#[cfg(test)]
use socket2::SockRef;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{edge::limiter::Bounds, runtime::config::Limits};

/// Handshakes per second and core, rounded. Measured on two cores shared with the devices: 15,000 devices were admitted
/// within 3.8 s (test `fifteen_thousand_devices_behind_one_address_connect`).
const HANDSHAKES_PER_SECOND_AND_CORE: usize = 2_500;

/// Maximum backlog of a listener in the kernel, and the setting that resets further connections. With 0 the kernel
/// ignores them, and the client retries.
const SOMAXCONN: &str = "/proc/sys/net/core/somaxconn";
const ABORT_ON_OVERFLOW: &str = "/proc/sys/net/ipv4/tcp_abort_on_overflow";
/// The kernel's default since Linux 5.4, if the file cannot be read.
const SOMAXCONN_DEFAULT: usize = 4_096;

/// Kernel buffer for data to a device that does not read, in bytes; the kernel doubles it for its own overhead. Without
/// it a buffer grows to 4 MiB and more. Enough for the largest default message (64 KiB) at once.
const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// Keepalive: time without a byte before the first probe, between probes, and the number of probes.
pub(super) const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
pub(super) const KEEPALIVE_PROBES: u32 = 3;
/// Maximum time for which the kernel keeps a connection whose peer acknowledges nothing (`TCP_USER_TIMEOUT`). The
/// kernel's default is about 15 min. It equals the total time of keepalive, because this option overrides the number of
/// keepalive probes (tcp(7)).
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(120);

/// Open files reserved for databases, the API, logs and refusals. Handshakes have their own: a full node still reads
/// requests.
const FILES_RESERVED: usize = 256;

/// Maximum time of a connection to another listener at the address. The kernel accepts it at once if there is one.
const PROBE_TIME_MAX: Duration = Duration::from_millis(200);

impl Bounds {
    /// From the settings, and from the limit on open files, which is raised to its maximum.
    #[must_use]
    pub fn of_process(limits: &Limits) -> Self {
        Self::from_files(limits, raise_open_files())
    }

    fn from_files(limits: &Limits, files: usize) -> Self {
        let reserved = FILES_RESERVED.saturating_add(limits.handshakes_max);
        let possible = files.saturating_sub(reserved.min(files / 2)).max(1);
        let connections = match limits.connections_max {
            0 => possible,
            wanted => wanted.min(possible),
        };
        Self {
            connections,
            handshakes: limits.handshakes_max.min(connections.div_ceil(2)).max(1),
        }
    }
}

/// Backlog of the listener: as many connections as are answered in about a second, so that a client that waits there is
/// still waiting at its turn. The kernel ignores further ones, whose own kernel repeats the SYN after 1, 3 and 7 s.
/// That paces them at no cost (docs/design/pacing.md).
pub(super) fn backlog_of_machine() -> i32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let somaxconn = kernel_setting(SOMAXCONN).unwrap_or(SOMAXCONN_DEFAULT);
    let backlog = backlog(cores, somaxconn);
    tracing::info!(backlog, somaxconn, cores, "connections that may wait to be accepted");
    if kernel_setting(ABORT_ON_OVERFLOW).is_some_and(|setting| setting != 0) {
        tracing::warn!(
            "net.ipv4.tcp_abort_on_overflow is set: in a storm the kernel resets devices instead of letting them wait; set it to 0"
        );
    }
    i32::try_from(backlog).unwrap_or(i32::MAX)
}

fn backlog(cores: usize, somaxconn: usize) -> usize {
    cores
        .saturating_mul(HANDSHAKES_PER_SECOND_AND_CORE)
        .min(somaxconn)
        .max(1)
}

fn kernel_setting(path: &str) -> Option<usize> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Sets the soft limit on open files to the hard one. Returns it.
fn raise_open_files() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let effective = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    effective.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX))
}

/// Whether other gateways listen on the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// None can.
    Alone,
    /// Gateways of the same user with the same setting can (SO_REUSEPORT, socket(7)).
    Shared,
}

impl Sharing {
    /// The value for the setting `server.share_port`.
    #[must_use]
    pub const fn of(share_port: bool) -> Self {
        if share_port { Self::Shared } else { Self::Alone }
    }
}

pub(super) fn listen(address: SocketAddr, sharing: Sharing, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart binds the port while old connections are still closing.
    socket.set_reuse_address(true)?;
    if sharing == Sharing::Shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit these options on Linux, without a system call for each.
    socket.set_tcp_nodelay(true)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.set_keepalive(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_AFTER)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    TcpListener::from_std(socket.into())
}

/// Whether any gateway listens at this address.
pub(super) async fn is_anyone_at(address: SocketAddr) -> bool {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    let probe = TcpStream::connect(SocketAddr::new(ip, address.port()));
    // Only a refusal shows that no gateway listens: one with a full backlog does not answer.
    !matches!(timeout(PROBE_TIME_MAX, probe).await, Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The options that accepted sockets inherit, for a test.
#[cfg(test)]
pub(super) fn options_of(stream: &TcpStream) -> io::Result<(bool, bool, bool)> {
    let socket = SockRef::from(stream);
    let is_bounded = socket.send_buffer_size()? <= 2 * SEND_BUFFER_BYTES;
    Ok((socket.tcp_nodelay()?, socket.keepalive()?, is_bounded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::default()
    }

    #[test]
    fn backlog_is_a_second_of_handshakes_within_what_the_kernel_allows() {
        assert_eq!(backlog(1, 4_096), 2_500);
        assert_eq!(backlog(2, 4_096), 4_096);
        assert_eq!(backlog(16, 65_535), 40_000);
        assert_eq!(backlog(1, 0), 1);
    }

    #[test]
    fn bounds_leave_files_for_the_rest_of_the_process() {
        let bounds = |files| Bounds::from_files(&limits(), files);

        assert_eq!(
            bounds(20_000),
            Bounds {
                connections: 19_244,
                handshakes: 500
            }
        );
        assert_eq!(
            bounds(256),
            Bounds {
                connections: 128,
                handshakes: 64
            }
        );
        assert!(bounds(0).connections >= 1);
    }

    #[test]
    fn configured_bound_counts_where_the_files_allow_it() {
        let limits = Limits {
            connections_max: 100,
            ..limits()
        };

        assert_eq!(Bounds::from_files(&limits, 20_000).connections, 100);
        assert_eq!(Bounds::from_files(&limits, 64).connections, 32);
    }
}
