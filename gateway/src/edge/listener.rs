//! The device listener: accepts connections within bounds, and passes each to the given handler.
//!
//! Start with [`Listener::run`]. While [`Bounds::handshakes`] connections have not sent a complete head, nothing is
//! accepted. New connections wait in the kernel's backlog, which costs nothing, and the CPU is left to live sessions.
//! An accept that fails for lack of files or memory pauses; it never spins. A full gateway that shares its address with
//! others stops listening, so that the kernel sends new connections to them.

mod socket;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::FutureExt;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::OwnedSemaphorePermit,
    task::coop::unconstrained,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

pub use self::socket::Sharing;
pub use crate::edge::limiter::Bounds;

use self::socket::{backlog_of_machine, is_anyone_at, listen};
use crate::{
    edge::{
        address::{Network, Share},
        limiter::{self, ConnectionLimiter, HandshakePermit, Rejected},
        proxy::Proxies,
    },
    fleet::panics::Panics,
    metrics::Metrics,
    runtime::{config::Limits, memory::Memory},
};

/// Minimum and maximum pause after an accept that failed for lack of files or memory.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Interval at which a full gateway that left its address checks whether it has room again, or is the last one.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Time for which a full gateway that is the last one at its address keeps listening, so that devices get a hint. Then
/// it checks again.
const LAST_STAYS_FOR: Duration = Duration::from_secs(3);

/// Dependencies of the listener.
pub struct Context {
    pub metrics: Arc<Metrics>,
    pub panics: Arc<Panics>,
    pub proxies: Arc<Proxies>,
}

/// A connection that was just accepted.
pub struct Connection {
    pub stream: TcpStream,
    pub peer: SocketAddr,
    /// Its share of the node's connections, or why it gets none.
    pub share: Result<Share, Rejected>,
    /// Held until its head is complete.
    pub permit: HandshakePermit,
}

/// A bound and listening socket.
pub struct Listener {
    /// `None` while the address is left to the others that share it.
    tcp: Option<TcpListener>,
    address: SocketAddr,
    sharing: Sharing,
    backlog: i32,
    /// Whether it is full, and accepts only connections that already wait.
    is_leaving: bool,
    /// Time until which it keeps listening although it is full, as the last one at its address.
    stays_until: Option<Instant>,
    limiter: Arc<ConnectionLimiter>,
}

impl Listener {
    /// Binds `address`; port 0 takes a free port.
    ///
    /// # Errors
    /// The address is in use, or does not belong to this machine.
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
            limiter: Arc::new(ConnectionLimiter::new(bounds, limits, memory)),
        })
    }

    /// The address in use.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until `hard` is cancelled, then waits for all connections to end. It also accepts while the node drains,
    /// so that devices get an answer.
    pub async fn run<F>(
        mut self,
        context: Context,
        serve: impl Fn(Arc<ConnectionLimiter>, Connection) -> F,
        hard: CancellationToken,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let Context {
            metrics,
            panics,
            proxies,
        } = &context;
        let mut pause = Pause::default();
        let forgetting = limiter::forget_idle(Arc::clone(&self.limiter));
        let publishing = limiter::publish(Arc::clone(&self.limiter), Arc::clone(metrics));
        tokio::pin!(forgetting, publishing);
        loop {
            let accepted = tokio::select! {
                biased;
                () = hard.cancelled() => break,
                () = &mut forgetting => continue,
                () = &mut publishing => continue,
                accepted = self.accept(metrics) => accepted,
            };
            match accepted {
                Ok((stream, peer, permit)) => {
                    pause.end();
                    let is_balancer = proxies.speaks_for_others(peer.ip());
                    let network = (!is_balancer).then(|| Network::from(peer.ip()));
                    let (share, permit) = self.limiter.admit(network, permit);
                    let connection = Connection {
                        stream,
                        peer,
                        share,
                        permit,
                    };
                    let life = serve(Arc::clone(&self.limiter), connection);
                    // Boxed, because a task holds twice the size of the future that it awaits. Measured: 7 KB less per
                    // handshake.
                    self.limiter.spawn(panics, Box::pin(life));
                }
                Err(error) if is_the_peers(&error) => metrics.connections.increment("accept_error"),
                Err(error) => {
                    let span = pause.begin(&error, metrics);
                    tokio::select! {
                        () = hard.cancelled() => break,
                        () = sleep(span) => {}
                    }
                }
            }
        }
        drop(self.tcp);
        self.limiter.closing.cancel();
        self.limiter.tasks.close();
        self.limiter.tasks.wait().await;
    }

    /// Accepts the next connection, once there is a permit for its handshake.
    ///
    /// # Cancel safety
    /// Safe: a connection is either returned or still in the backlog.
    async fn accept(&mut self, metrics: &Metrics) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let permit = self.limiter.acquire().await.map_err(io::Error::other)?;
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

    /// If the gateway is full, stops the kernel from adding connections to the backlog. Those that wait there are
    /// accepted and get a hint, because closing would reset them. When none is left, the address is left to the others.
    fn leave_if_full(&mut self) -> io::Result<Option<(TcpStream, SocketAddr)>> {
        let stays = self.stays_until.is_some_and(|until| Instant::now() < until);
        let leaves = self.is_leaving || !stays && self.limiter.is_full();
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

    /// Waits until the gateway listens again: it has room, or no other gateway is left to give devices a hint. Returns
    /// at once if it listens.
    async fn await_return(&mut self, metrics: &Metrics) {
        while self.tcp.is_none() {
            if self.limiter.has_room() {
                tracing::debug!(address = %self.address, "room again: listening");
                return;
            }
            if !is_anyone_at(self.address).await {
                self.stays_until = Some(Instant::now() + LAST_STAYS_FOR);
                return;
            }
            metrics.listening.set(0.0);
            sleep(ROOM_CHECK_INTERVAL).await;
        }
    }
}

/// Whether the connection ended before it was accepted, which is not an error of the gateway.
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

/// Pause after a lack of files or memory. It doubles each time, and is logged once.
#[derive(Debug, Default)]
struct Pause {
    last: Option<Duration>,
}

impl Pause {
    fn begin(&mut self, error: &io::Error, metrics: &Metrics) -> Duration {
        metrics.accept_pauses.increment(1);
        if self.last.is_none() {
            tracing::warn!(error = %error, "accepting devices paused: out of files or memory");
        }
        let span = self.last.map_or(PAUSE_MIN, |last| (last * 2).min(PAUSE_MAX));
        self.last = Some(span);
        span
    }

    fn end(&mut self) {
        if self.last.take().is_some() {
            tracing::info!("accepting devices resumed");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::{
        socket::{KEEPALIVE_AFTER, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, options_of},
        *,
    };

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
