//! The door for devices: accepts connections, bounded, and hands each to [`connection`].
//!
//! Start with [`Listener::run`]. While [`Bounds::handshakes`] connections have not yet shown a complete head, nothing is
//! accepted: newcomers wait in the kernel's backlog, which costs nothing, and live sessions keep the machine. An accept
//! that fails for want of files or memory pauses; it never spins. A full gateway that shares its address with others stops listening,
//! so that the kernel sends newcomers to them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::OwnedSemaphorePermit,
    task::coop::unconstrained,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    address::Network,
    config::Limits,
    connection,
    door::{self, Door},
    memory::Memory,
    metrics::Metrics,
    state::Shared,
};

/// Handshakes that a core answers in a second, in round numbers. Measured on two cores that the devices shared: 15,000 devices were
/// let in within 3.8 s (test `fifteen_thousand_devices_behind_one_address_connect`).
const HANDSHAKES_PER_SECOND_AND_CORE: usize = 2_500;

/// Most connections that the kernel holds for a listener, whatever it asks for; and what it does with one more where this is
/// not 0: it resets it, instead of leaving the peer to try again.
const SOMAXCONN: &str = "/proc/sys/net/core/somaxconn";
const ABORT_ON_OVERFLOW: &str = "/proc/sys/net/ipv4/tcp_abort_on_overflow";
/// The kernel's default since Linux 5.4, where it can't be asked.
const SOMAXCONN_DEFAULT: usize = 4_096;

/// What the kernel may hold for a device that does not read, in bytes; it takes twice as much for its own book-keeping. Without it a
/// buffer grows to 4 MiB and more. Enough for the largest message by default (64 KiB) in one go.
const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// Keepalive: time without a byte before the first probe, between probes, and the number of probes.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_PROBES: u32 = 3;
/// Maximum time that the kernel keeps a connection whose peer acknowledges nothing (`TCP_USER_TIMEOUT`). The kernel's own time is about 15 min.
/// This is what keepalive allows in all: where this option is set, it takes the place of the number of keepalive probes (tcp(7)).
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(120);

/// Files kept free for databases, the API, logs and refusals. Handshakes have their own: a full node still reads who is there.
const FILES_RESERVED: usize = 256;

/// First and longest pause after an accept that failed for want of something.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A full gateway that has left its address looks this often whether it has room again, or nobody else is there.
const ROOM_LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// A full gateway that found nobody else at its address stays for so long, so that devices are told when to come back, and then looks again.
const LAST_FOR: Duration = Duration::from_secs(3);
/// Somebody who listens takes a connection at once: it is the kernel's to do.
const PROBE_TIME_MAX: Duration = Duration::from_millis(200);

/// How many connections this process can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Connections at a time, sessions and handshakes together.
    pub connections: usize,
    /// Handshakes under way: accepted, head not complete.
    pub handshakes: usize,
}

impl Bounds {
    /// From the settings, and from the limit on open files, which is raised as far as it goes.
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

/// Connections that wait to be accepted: as many as are answered in about a second, so that whoever waits there is still
/// waiting when it is its turn. One more gets no answer from the kernel, and its own repeats its SYN after 1, 3 and 7 s, which is
/// pacing for free (overload.md section 10b).
fn backlog_of_machine() -> i32 {
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

/// Sets the soft limit on open files to the hard one, and says what it is.
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

/// A bound and listening socket.
pub struct Listener {
    /// `None` while the address is left to the others that share it.
    tcp: Option<TcpListener>,
    address: SocketAddr,
    sharing: Sharing,
    backlog: i32,
    /// It is full, and takes only those who wait already.
    is_leaving: bool,
    /// It is the last one at its address until then, full as it is.
    stays_until: Option<Instant>,
    door: Arc<Door>,
}

/// Whether other gateways listen on the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// None can.
    Alone,
    /// Those of the same user that say so, too (SO_REUSEPORT, socket(7)).
    Shared,
}

impl Sharing {
    /// As the setting has it.
    #[must_use]
    pub const fn of(share_port: bool) -> Self {
        if share_port { Self::Shared } else { Self::Alone }
    }
}

fn listen(address: SocketAddr, sharing: Sharing, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart takes the port while old connections of it are still dying.
    socket.set_reuse_address(true)?;
    if sharing == Sharing::Shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit these on Linux: no system call for each of them.
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

/// Whether any gateway listens at this address of ours.
async fn is_anyone_at(address: SocketAddr) -> bool {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    let probe = TcpStream::connect(SocketAddr::new(ip, address.port()));
    // Only a refusal tells that there is nobody: whoever has a full backlog is there.
    !matches!(timeout(PROBE_TIME_MAX, probe).await, Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Listener {
    /// Binds `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address is taken, or is none of this machine's.
    pub fn bind(
        address: SocketAddr,
        sharing: Sharing,
        bounds: Bounds,
        limits: &Limits,
        memory: Arc<Memory>,
    ) -> io::Result<Self> {
        let backlog = backlog_of_machine();
        let tcp = listen(address, sharing, backlog)?;
        Ok(Self {
            address: tcp.local_addr()?,
            tcp: Some(tcp),
            sharing,
            backlog,
            is_leaving: false,
            stays_until: None,
            door: Arc::new(Door::new(bounds, limits, memory)),
        })
    }

    /// The address in use.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until `hard` is cancelled, then waits for every connection to end. While the node drains it still accepts:
    /// devices are owed an answer.
    pub async fn run(mut self, shared: Shared, hard: CancellationToken) {
        let mut pause = Pause::default();
        let forgetting = door::forget_idle(Arc::clone(&self.door));
        let publishing = door::publish(Arc::clone(&self.door), Arc::clone(&shared.metrics));
        tokio::pin!(forgetting, publishing);
        loop {
            let accepted = tokio::select! {
                biased;
                () = hard.cancelled() => break,
                () = &mut forgetting => continue,
                () = &mut publishing => continue,
                accepted = self.accept(&shared.metrics) => accepted,
            };
            match accepted {
                Ok((stream, peer, permit)) => {
                    pause.end();
                    self.receive(&shared, stream, peer, permit);
                }
                Err(error) if is_the_peers(&error) => shared.metrics.connections.increment("accept_error"),
                Err(error) => {
                    let span = pause.begin(&error, &shared.metrics);
                    tokio::select! {
                        () = hard.cancelled() => break,
                        () = sleep(span) => {}
                    }
                }
            }
        }
        drop(self.tcp);
        self.door.closing.cancel();
        self.door.tasks.close();
        self.door.tasks.wait().await;
    }

    /// The next connection, once there is room for its handshake.
    ///
    /// # Cancel safety
    /// Safe: a connection is either returned or still in the backlog.
    async fn accept(&mut self, metrics: &Metrics) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let permit = self.door.enter().await.map_err(io::Error::other)?;
        if self.sharing == Sharing::Shared {
            if let Some((stream, peer)) = self.leave_if_full()? {
                return Ok((stream, peer, permit));
            }
            self.await_return(metrics).await;
        }
        metrics.listening.set(1.0);
        let tcp = match &self.tcp {
            Some(tcp) => tcp,
            None => self.tcp.insert(listen(self.address, self.sharing, self.backlog)?),
        };
        let (stream, peer) = tcp.accept().await?;
        Ok((stream, peer, permit))
    }

    /// Full: no more connections are taken into the backlog. Those that wait there are accepted, as closing would reset them, and
    /// are told when to come back. When none is left, the address is left to the others.
    fn leave_if_full(&mut self) -> io::Result<Option<(TcpStream, SocketAddr)>> {
        let stays = self.stays_until.is_some_and(|until| Instant::now() < until);
        let leaves = self.is_leaving || !stays && self.door.is_full();
        let Some(tcp) = self.tcp.as_ref().filter(|_| leaves) else {
            return Ok(None);
        };
        if !self.is_leaving {
            SockRef::from(tcp).listen(0)?;
            self.is_leaving = true;
        }
        let waiting = unconstrained(tcp.accept()).now_or_never();
        if waiting.is_none() {
            tracing::debug!(address = %self.address, "full: leaving the address to the others that share it");
            self.tcp = None;
            self.is_leaving = false;
        }
        waiting.transpose()
    }

    /// Returns at once where it has not left; else when it has room again, or when nobody else is there to tell devices when to come back.
    async fn await_return(&mut self, metrics: &Metrics) {
        while self.tcp.is_none() {
            if self.door.has_room() {
                tracing::debug!(address = %self.address, "room again: listening");
                return;
            }
            if !is_anyone_at(self.address).await {
                self.stays_until = Some(Instant::now() + LAST_FOR);
                return;
            }
            metrics.listening.set(0.0);
            sleep(ROOM_LOOK_INTERVAL).await;
        }
    }

    fn receive(&self, shared: &Shared, stream: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        let is_balancer = shared.proxies.speaks_for_others(peer.ip());
        let network = (!is_balancer).then(|| Network::from(peer.ip()));
        let (place, handshake) = self.door.admit(network, permit);
        let life = connection::serve(
            Arc::clone(shared),
            Arc::clone(&self.door),
            stream,
            peer,
            place,
            handshake,
        );
        // Boxed, since a task holds twice what it was given to await: measured, 7 KB less for each handshake.
        self.door.spawn(shared, Box::pin(life));
    }
}

/// The connection was gone before it was accepted: nothing is wrong with us.
fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
            | io::ErrorKind::NotConnected
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
    )
}

/// Out of files or memory: waits longer each time, and says so once.
#[derive(Debug, Default)]
struct Pause {
    last: Option<Duration>,
}

impl Pause {
    fn begin(&mut self, error: &io::Error, metrics: &Metrics) -> Duration {
        metrics.accept_pauses.increment(1);
        if self.last.is_none() {
            tracing::warn!(error = %error, "accepting devices paused: the system gives no more connections");
        }
        let span = self.last.map_or(PAUSE_MIN, |last| (last * 2).min(PAUSE_MAX));
        self.last = Some(span);
        span
    }

    fn end(&mut self) {
        if self.last.take().is_some() {
            tracing::info!("accepting devices goes on");
        }
    }
}

/// The options that accepted sockets inherit, read back by a test.
#[cfg(test)]
fn options_of(stream: &TcpStream) -> io::Result<(bool, bool, bool)> {
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

    #[tokio::test]
    async fn accepted_sockets_inherit_their_options() {
        let mut listener = Listener::bind(
            SocketAddr::from(([127, 0, 0, 1], 0)),
            Sharing::Alone,
            Bounds {
                connections: 4,
                handshakes: 2,
            },
            &limits(),
            Arc::default(),
        )
        .unwrap();
        let _client = TcpStream::connect(listener.local_addr()).await.unwrap();

        let (stream, ..) = listener.accept(&Metrics::new()).await.unwrap();

        assert_eq!(options_of(&stream).unwrap(), (true, true, true));
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn vanished_device_is_given_up_when_keepalive_would() {
        let bounds = Bounds {
            connections: 4,
            handshakes: 2,
        };
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut listener = Listener::bind(address, Sharing::Alone, bounds, &limits(), Arc::default()).unwrap();
        let _client = TcpStream::connect(listener.local_addr()).await.unwrap();

        let (stream, ..) = listener.accept(&Metrics::new()).await.unwrap();

        let given_up_after = SockRef::from(&stream).tcp_user_timeout().unwrap();
        assert_eq!(
            given_up_after,
            Some(KEEPALIVE_AFTER + KEEPALIVE_INTERVAL * KEEPALIVE_PROBES)
        );
    }

    #[tokio::test]
    async fn kernel_holds_little_for_a_peer_that_never_reads() {
        let bounds = Bounds {
            connections: 4,
            handshakes: 2,
        };
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut listener = Listener::bind(address, Sharing::Alone, bounds, &limits(), Arc::default()).unwrap();
        let client = tokio::net::TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(2_048).unwrap();
        let _client = client.connect(listener.local_addr()).await.unwrap();
        let (stream, ..) = listener.accept(&Metrics::new()).await.unwrap();

        let (mut taken, chunk) = (0, [0; 16 * 1024]);
        while timeout(Duration::from_millis(500), stream.writable()).await.is_ok() {
            match stream.try_write(&chunk) {
                Ok(len) => taken += len,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }

        assert!((16 * 1024..=256 * 1024).contains(&taken), "{taken}");
    }

    #[test]
    fn backlog_is_a_second_of_handshakes_within_what_the_kernel_allows() {
        assert_eq!(backlog(1, 4_096), 2_500);
        assert_eq!(backlog(2, 4_096), 4_096);
        assert_eq!(backlog(16, 65_535), 40_000);
        assert_eq!(backlog(1, 0), 1);
    }

    #[test]
    fn taken_port_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _guard = runtime.enter();
        let bounds = Bounds {
            connections: 4,
            handshakes: 2,
        };
        for sharing in [Sharing::Alone, Sharing::Shared] {
            let bind = |address, sharing| Listener::bind(address, sharing, bounds, &limits(), Arc::default());
            let first = bind(SocketAddr::from(([127, 0, 0, 1], 0)), sharing).unwrap();

            let second = bind(first.local_addr(), Sharing::Alone);

            assert_eq!(second.err().map(|error| error.kind()), Some(io::ErrorKind::AddrInUse));
        }
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

    #[test]
    fn pause_grows_to_a_second_and_starts_over() {
        let metrics = Metrics::new();
        let error = io::Error::other("out of files");
        let mut pause = Pause::default();

        let spans: Vec<Duration> = (0..8).map(|_| pause.begin(&error, &metrics)).collect();
        pause.end();

        assert_eq!(spans[0], PAUSE_MIN);
        assert_eq!(spans[7], PAUSE_MAX);
        assert_eq!(pause.begin(&error, &metrics), PAUSE_MIN);
    }
}
