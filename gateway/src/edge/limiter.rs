//! Limits on device connections: permits for handshakes, shares by address, connection tasks. Start with
//! [`ConnectionLimiter`].
//!
//! A handshake holds a permit from accept to a complete head. When all are taken, new connections wait in the kernel's
//! backlog, in order. Clients that take permits and send no head would therefore block all others. So while connections
//! wait, a handshake without a head is [parked](PARKED_AFTER): it keeps its deadline, and releases its permit.
//! [`PARKED_PER_PERMIT`] bounds the parked handshakes. Beyond it, a handshake is given up if it
//! - is [late](LATE_AFTER), and its address holds more than an even share of the permits; or
//! - has taken [a second](PRESSED_TIME_MAX).
//!
//! While no connection waits, no handshake is given up before its deadline. A handshake that has sent nothing needs
//! little memory. It is not counted among the parked ones, and may hold [a free connection](SILENT_PER_FREE).

mod pressure;

use std::{
    num::NonZeroU32,
    ops::RangeInclusive,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use seawall_proto::refusal::Limit;
use tokio::{
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::pressure::Pressure;
use crate::{
    edge::address::{Exhausted, FairShare, HandshakeRate, Network, Scope, Share},
    fleet::panics::Panics,
    metrics::Metrics,
    runtime::{capacity::PARKED_PER_PERMIT, config::Limits, memory::Memory},
};

/// Time after which a handshake without a head is parked while others wait. It is short, because parking costs nothing
/// while there is room. A fleet behind one address may connect all its sockets before it writes the first head. It
/// would otherwise be admitted no faster than all permits per [`LATE_AFTER`], and the kernel would drop the rest
/// (15,000 devices: 1.3 s instead of 0.6).
pub const PARKED_AFTER: Duration = Duration::from_millis(10);

/// Time after which a head is late. Most heads are sent with the last packet of the TCP handshake, and are there when
/// the connection is accepted. A proxy that connects before it has a request, a slow link or a lost packet delay it.
pub const LATE_AFTER: Duration = Duration::from_millis(100);

/// Maximum number of silent handshakes without a permit for each free connection. One takes 3.5 KB (measured with
/// 15,000); one that has begun may take 25 KB. With four, a fleet of 15,000 devices that connects all its sockets first
/// fits if the node may have 19,244 connections. Silent handshakes leave to others at least a fifth of the connections
/// that sessions do not use.
const SILENT_PER_FREE: usize = 4;
/// Maximum time of any handshake while others wait and the parked ones are at their maximum. It is long enough for all
/// but the worst links. It is short enough that clients that never send a head, from any number of addresses, give way
/// to others.
const PRESSED_TIME_MAX: Duration = Duration::from_secs(1);
/// Maximum time for the head of a connection that is rejected by its address. Only `/readyz` is answered normally: a
/// load balancer may probe from the same address, and may have to resend a packet (RFC 6298: after at least 200 ms in
/// practice).
pub const REJECTED_HEAD_TIME_MAX: Duration = Duration::from_millis(500);

/// See [`ConnectionLimiter::has_room`].
const ROOM_PART: usize = 100;

/// Maximum number of refused connections whose client gets time to read its answer. Further ones are closed at once:
/// only a flood causes them.
const LINGERING_MAX: usize = 64;

/// Time between two publications of the number of handshakes.
const GAUGES_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two sweeps of idle addresses, if handshakes are counted by address.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);

/// Maximum numbers of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Connections at a time: sessions and handshakes.
    pub connections: usize,
    /// Handshakes without a complete head.
    pub handshakes: usize,
}

/// State shared by all connections.
pub struct ConnectionLimiter {
    /// Maximum number of handshakes that hold a permit.
    permits: usize,
    /// Maximum number of connections of the node.
    connections: usize,
    memory: Arc<Memory>,
    /// One permit per handshake; released when the head is complete.
    handshakes: Arc<Semaphore>,
    handshake_shares: Arc<FairShare>,
    /// One for each handshake that was parked after it had sent something.
    parked: Arc<Semaphore>,
    /// Number of parked handshakes that have sent nothing.
    silent: Arc<AtomicUsize>,
    connection_shares: Arc<FairShare>,
    /// Only if the operator set a maximum.
    handshake_rate: Option<HandshakeRate>,
    pub(crate) lingering: Semaphore,
    pressure: Pressure,
    /// Every connection's task.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the process is about to end: connections that wait are answered at once.
    pub(crate) closing: CancellationToken,
}

/// The permits of a connection until its head is complete.
pub struct HandshakePermit {
    held: Held,
    /// Whether it is also one of the node's connections, which may become a session.
    has_connection: bool,
}

#[expect(dead_code, reason = "permits are held, and given back when they are dropped")]
enum Held {
    /// The share is released before the permit, so that the next holder of the permit finds room in the shares. `None`:
    /// its address has its share of the permits, and only `/readyz` is answered.
    Permit(Option<Share>, OwnedSemaphorePermit),
    Parked(OwnedSemaphorePermit),
    Silent(Silent),
}

/// A silent handshake, counted until dropped.
struct Silent(Arc<AtomicUsize>);

impl Drop for Silent {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether a handshake has sent anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    Nothing,
    Something,
}

/// Decision on a late handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// Continue: no connection waits because of it.
    Stay,
    /// Give up: others wait because of its address, or because of it.
    Leave,
}

impl HandshakePermit {
    /// Records that its head takes long: its address gets at most a fair share of the permits.
    pub(crate) fn mark_slow(&mut self) {
        if let Held::Permit(Some(share), _) = &mut self.held {
            share.mark_slow();
        }
    }
}

/// Why a connection gets no session, whatever it requests. Its head is read nevertheless: a load balancer may ask for
/// `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// The node is at its maximum of connections. Once the hello is read, the device can get a slot.
    NodeFull,
    /// By a limit on its address.
    Address(Limit),
}

impl Rejected {
    /// The limit on its address, if that is the reason.
    pub(crate) const fn limit(self) -> Option<Limit> {
        match self {
            Self::NodeFull => None,
            Self::Address(limit) => Some(limit),
        }
    }

    /// Whether it is rejected for the rate or the slowness of its address, not for the number of its connections.
    pub(crate) fn is_by_pace(self) -> bool {
        self.limit().is_some_and(|limit| match limit {
            Limit::AddressRate | Limit::AddressHandshakes => true,
            Limit::AddressConnections | Limit::Credential | Limit::Rule => false,
        })
    }
}

impl ConnectionLimiter {
    pub fn new(bounds: Bounds, limits: &Limits, memory: Arc<Memory>) -> Self {
        let rate = limits.handshakes_per_second_per_address_max.and_then(NonZeroU32::new);
        Self {
            permits: bounds.handshakes,
            connections: bounds.connections,
            memory,
            handshakes: Arc::new(Semaphore::new(bounds.handshakes)),
            handshake_shares: FairShare::new(bounds.handshakes, Scope::TheSlow, None),
            parked: Arc::new(Semaphore::new(bounds.handshakes * PARKED_PER_PERMIT)),
            silent: Arc::default(),
            connection_shares: FairShare::new(bounds.connections, Scope::Everyone, limits.connections_per_address_max),
            handshake_rate: rate.map(HandshakeRate::new),
            lingering: Semaphore::new(LINGERING_MAX),
            pressure: Pressure::new(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
        }
    }

    /// Acquires a handshake permit, once one is free.
    ///
    /// # Errors
    /// Never while the limiter exists.
    ///
    /// # Cancel safety
    /// Safe: it has taken no permit when dropped before it is ready.
    pub async fn acquire(&self) -> Result<OwnedSemaphorePermit, AcquireError> {
        if let Ok(permit) = Arc::clone(&self.handshakes).try_acquire_owned() {
            return Ok(permit);
        }
        self.pressure.note();
        let permit = Arc::clone(&self.handshakes).acquire_owned().await;
        self.pressure.note();
        permit
    }

    /// Decides on a handshake that has had no head for `elapsed`, at least [`PARKED_AFTER`]. If others wait it is
    /// parked. A handshake without one of the node's connections is not, because open files are bounded by those.
    #[must_use]
    pub(crate) fn check_late(&self, handshake: &mut HandshakePermit, elapsed: Duration, sent: Sent) -> Late {
        if let (Held::Silent(_), Sent::Something) = (&handshake.held, sent)
            && !self.try_begin(handshake)
        {
            return Late::Leave;
        }
        if !self.pressure.was_on_lately() {
            return Late::Stay;
        }
        let has_had_its_time = elapsed >= PRESSED_TIME_MAX;
        let (is_late_of_a_crowd, has_no_room) = match &handshake.held {
            Held::Parked(_) => (false, self.parked.available_permits() == 0),
            Held::Silent(_) => (false, self.silent_max() < self.silent.load(Ordering::Relaxed)),
            Held::Permit(share, _) => {
                let is_of_a_crowd = || share.as_ref().is_none_or(Share::is_of_a_crowd);
                (elapsed >= LATE_AFTER && is_of_a_crowd(), true)
            }
        };
        let has_permit = matches!(handshake.held, Held::Permit(..));
        if has_permit && handshake.has_connection && self.park(handshake, sent) {
            return Late::Stay;
        }
        if is_late_of_a_crowd || has_had_its_time && has_no_room {
            Late::Leave
        } else {
            Late::Stay
        }
    }

    /// Parks a handshake. Returns `false` if there is no room.
    fn park(&self, handshake: &mut HandshakePermit, sent: Sent) -> bool {
        let held = match sent {
            // If memory is short, silent ones have the same bound as the others.
            Sent::Nothing if self.memory.has_room() => self.try_hold_silent().map(Held::Silent),
            Sent::Nothing | Sent::Something => self.try_park(),
        };
        held.map(|held| handshake.held = held).is_some()
    }

    /// Moves a silent handshake that has sent something to the other parked ones, because it is about to need memory.
    /// Returns `false` if there is no room; it then stays silent.
    #[must_use]
    pub(crate) fn try_begin(&self, handshake: &mut HandshakePermit) -> bool {
        if !matches!(handshake.held, Held::Silent(_)) {
            return true;
        }
        self.try_park().map(|held| handshake.held = held).is_some()
    }

    fn try_park(&self) -> Option<Held> {
        Arc::clone(&self.parked).try_acquire_owned().ok().map(Held::Parked)
    }

    fn try_hold_silent(&self) -> Option<Silent> {
        self.silent.fetch_add(1, Ordering::Relaxed);
        let silent = Silent(Arc::clone(&self.silent));
        (self.silent.load(Ordering::Relaxed) <= self.silent_max()).then_some(silent)
    }

    fn silent_max(&self) -> usize {
        let free = self.connections.saturating_sub(self.connection_shares.used());
        free.saturating_mul(SILENT_PER_FREE)
    }

    /// Spawns a connection's task, tracked. A panic ends that connection alone: its permits are released as it unwinds,
    /// the panic is counted, and the first one raises an alarm.
    pub fn spawn(self: &Arc<Self>, panics: &Arc<Panics>, life: impl Future<Output = ()> + Send + 'static) {
        let panics = Arc::clone(panics);
        // Not an `async` block, whose future would hold `life` twice: as it was passed, and as it is awaited.
        let life = AssertUnwindSafe(life).catch_unwind().map(move |ended| {
            if ended.is_err() {
                panics.count("the task of a device's connection");
            }
        });
        self.tasks.spawn(life);
    }

    /// Whether all connections of the node are taken, or memory is short.
    pub(crate) fn is_full(&self) -> bool {
        self.connection_shares.used() >= self.connections || self.memory.is_full()
    }

    /// Whether at least 1 % of the connections is free, and memory is not short. The margin keeps a full node from
    /// opening and closing with each device.
    pub(crate) fn has_room(&self) -> bool {
        let connections_max = self.connections - self.connections.div_ceil(ROOM_PART);
        self.connection_shares.used() <= connections_max && self.memory.has_room()
    }

    /// Records a complete head.
    pub(crate) fn note_head(&self) {
        self.pressure.note_head();
    }

    /// Range of the hint for a handshake that is given up.
    pub(crate) fn hint_range(&self) -> RangeInclusive<Duration> {
        self.pressure
            .hint_range(self.under_way().iter().map(|(_, count)| count).sum())
    }

    /// Handshakes by their state: the label `state` of `seawall_handshakes_under_way`.
    fn under_way(&self) -> [(&'static str, usize); 3] {
        // Counted by shares, not by permits: the listener holds a permit while no device connects.
        let parked_max = self.permits * PARKED_PER_PERMIT;
        [
            ("place", self.handshake_shares.used()),
            ("aside", parked_max.saturating_sub(self.parked.available_permits())),
            ("silent", self.silent.load(Ordering::Relaxed)),
        ]
    }

    /// Number of connections of the node.
    #[cfg(test)]
    pub fn connections_held(&self) -> usize {
        self.connection_shares.used()
    }

    /// Takes a share of the node's connections for `network`, or returns why it gets none. Its head is read with the
    /// permit in either case. `None`: from a load balancer that will name the origin; then it must be
    /// [settled](Self::settle).
    pub fn admit(
        &self,
        network: Option<Network>,
        permit: OwnedSemaphorePermit,
    ) -> (Result<Share, Rejected>, HandshakePermit) {
        let connection = self.take_connection(network);
        let handshake_share = self.handshake_shares.take(network).ok();
        let is_too_fast = || network.is_some_and(|network| self.is_too_fast(network));
        let share = match connection {
            Err(rejected @ Rejected::Address(_)) => Err(rejected),
            Ok(_) | Err(Rejected::NodeFull) if is_too_fast() => Err(Rejected::Address(Limit::AddressRate)),
            Ok(_) | Err(Rejected::NodeFull) if handshake_share.is_none() => {
                Err(Rejected::Address(Limit::AddressHandshakes))
            }
            share @ (Ok(_) | Err(Rejected::NodeFull)) => share,
        };
        let handshake = HandshakePermit {
            held: Held::Permit(handshake_share, permit),
            has_connection: share.is_ok(),
        };
        (share, handshake)
    }

    /// Takes a share for a device that was rejected for the rate of its address, and has proved that it may connect
    /// now. The maxima of its address and the node still apply.
    pub fn readmit(&self, network: Network) -> Result<Share, Rejected> {
        self.take_connection(Some(network))
    }

    fn take_connection(&self, network: Option<Network>) -> Result<Share, Rejected> {
        self.connection_shares
            .take(network)
            .map_err(|exhausted| match exhausted {
                Exhausted::Bound => Rejected::NodeFull,
                Exhausted::Address => Rejected::Address(Limit::AddressConnections),
            })
    }
}

impl ConnectionLimiter {
    /// Counts a connection, and its handshake if that still runs, for the address that its load balancer has named.
    pub fn settle(
        &self,
        share: &mut Result<Share, Rejected>,
        mut handshake: Option<&mut HandshakePermit>,
        network: Network,
    ) {
        if let Ok(connection) = share
            && let Err(rejected) = self.count_for(connection, handshake.as_deref_mut(), network)
        {
            *share = Err(rejected);
        }
        if let (Err(_), Some(handshake)) = (&share, handshake) {
            handshake.has_connection = false;
        }
    }

    fn count_for(
        &self,
        connection: &mut Share,
        handshake: Option<&mut HandshakePermit>,
        network: Network,
    ) -> Result<(), Rejected> {
        let rejected = |limit| Err(Rejected::Address(limit));
        if connection.settle(network).is_err() {
            return rejected(Limit::AddressConnections);
        }
        if self.is_too_fast(network) {
            return rejected(Limit::AddressRate);
        }
        if let Some(Held::Permit(Some(share), _)) = handshake.map(|handshake| &mut handshake.held)
            && share.settle(network).is_err()
        {
            return rejected(Limit::AddressHandshakes);
        }
        Ok(())
    }

    fn is_too_fast(&self, network: Network) -> bool {
        self.handshake_rate.as_ref().is_some_and(|rate| !rate.allows(network))
    }
}

/// Publishes the number of handshakes. Never returns.
#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are floating point, and these counts far below 2^53"
)]
pub async fn publish(limiter: Arc<ConnectionLimiter>, metrics: Arc<Metrics>) {
    loop {
        sleep(GAUGES_INTERVAL).await;
        for (state, count) in limiter.under_way() {
            metrics.handshakes_under_way.set(state, count as f64);
        }
    }
}

/// Removes idle addresses from the table of handshakes, on a blocking thread. Never returns.
pub async fn forget_idle(limiter: Arc<ConnectionLimiter>) {
    if limiter.handshake_rate.is_none() {
        std::future::pending::<()>().await;
    }
    loop {
        sleep(FORGET_INTERVAL).await;
        let limiter = Arc::clone(&limiter);
        let sweep =
            tokio::task::spawn_blocking(move || limiter.handshake_rate.as_ref().map(HandshakeRate::forget_idle));
        // Cancelled only when the runtime ends.
        let _ = sweep.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::memory::Sources;

    fn limiter(memory: &Arc<Memory>) -> ConnectionLimiter {
        let bounds = Bounds {
            connections: 100,
            handshakes: 10,
        };
        ConnectionLimiter::new(bounds, &Limits::default(), Arc::clone(memory))
    }

    /// Handshakes that have had no head for [`PARKED_AFTER`] while others wait, each of another address, until one must
    /// keep its permit.
    fn late_ones(limiter: &ConnectionLimiter, sent: Sent) -> Vec<(Result<Share, Rejected>, HandshakePermit)> {
        limiter.pressure.note();
        let mut late = Vec::new();
        for address in 0.. {
            let permit = Arc::clone(&limiter.handshakes).try_acquire_owned().unwrap();
            let (connection, mut handshake) = limiter.admit(Some(Network::V4(address)), permit);
            assert_eq!(limiter.check_late(&mut handshake, PARKED_AFTER, sent), Late::Stay);
            if matches!(handshake.held, Held::Permit(..)) {
                break;
            }
            late.push((connection, handshake));
        }
        late
    }

    #[test]
    fn silent_handshakes_leave_a_fifth_of_the_connections_to_others() {
        let limiter = limiter(&Arc::default());

        let silent = late_ones(&limiter, Sent::Nothing);

        assert_eq!(silent.len(), 80);
        assert_eq!(limiter.under_way(), [("place", 0), ("aside", 0), ("silent", 80)]);
        drop(silent);
        assert_eq!(limiter.under_way(), [("place", 0), ("aside", 0), ("silent", 0)]);
    }

    #[test]
    fn a_silent_handshake_that_begins_needs_room_to_park() {
        let limiter = limiter(&Arc::default());
        let mut silent = late_ones(&limiter, Sent::Nothing);
        let (_, handshake) = silent.last_mut().unwrap();

        assert_eq!(limiter.check_late(handshake, PARKED_AFTER, Sent::Something), Late::Stay);
        assert_eq!(limiter.under_way(), [("place", 0), ("aside", 1), ("silent", 79)]);

        let _others: Vec<_> = std::iter::from_fn(|| limiter.try_park()).collect();
        let (_, handshake) = silent.first_mut().unwrap();
        assert_eq!(
            limiter.check_late(handshake, PARKED_AFTER, Sent::Something),
            Late::Leave
        );
    }

    #[test]
    fn silent_handshakes_that_have_had_a_second_give_connections_back_that_sessions_take() {
        let limiter = limiter(&Arc::default());
        let mut silent = late_ones(&limiter, Sent::Nothing);
        let (_, handshake) = &mut silent[0];
        assert_eq!(
            limiter.check_late(handshake, PRESSED_TIME_MAX, Sent::Nothing),
            Late::Stay
        );

        let _session = limiter.take_connection(Some(Network::V4(1_000))).unwrap();

        assert_eq!(limiter.check_late(handshake, PARKED_AFTER, Sent::Nothing), Late::Stay);
        assert_eq!(
            limiter.check_late(handshake, PRESSED_TIME_MAX, Sent::Nothing),
            Late::Leave
        );
    }

    /// The memory of a process whose maximum is a byte, so that it is short.
    fn memory_of_a_byte() -> Arc<Memory> {
        Arc::new(Memory::new(Sources::of(Vec::new(), 1, 1 << 40)))
    }

    #[test]
    fn node_is_full_where_memory_is_short_however_few_connections_it_holds() {
        let memory = memory_of_a_byte();
        let limiter = limiter(&memory);
        assert!(!limiter.is_full() && limiter.has_room());

        memory.measure(0);

        assert!(limiter.is_full() && !limiter.has_room());
    }
}
