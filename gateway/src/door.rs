//! What connections of devices hold, and for how long: places for handshakes, shares by address, tasks. Start with [`Door`].
//!
//! A place is held from accept to a complete head. When all are taken, newcomers wait in the kernel's backlog, behind each
//! other: so a crowd that takes places and shows no head would keep everybody out. While connections wait, a handshake that
//! [shows nothing](ASIDE_AFTER) therefore steps aside: it keeps its time, not its place. Only so many can stand aside; beyond that, one that
//! [is late](LATE_AFTER) and of an address that holds more than an even share of the places is given up, and so is any that has had [a second](PRESSED_TIME_MAX). Without
//! that pressure nobody is hurried. A handshake that has sent nothing at all takes no room aside: it needs little memory, and may hold
//! [a free connection](SILENT_PER_FREE).

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
    address::{Exhausted, FairShare, HandshakeRate, Network, Scope, Share},
    config::Limits,
    listener::Bounds,
    memory::Memory,
    metrics::Metrics,
    state::Shared,
};

/// While others wait, a handshake whose head is not there after this time steps aside. Soon, since it costs nothing while there is room: a fleet
/// behind one address that connects all devices before it writes the first head would otherwise get in at no more than so many
/// places in each [`LATE_AFTER`], and the kernel drop the rest (15,000 devices: 1.3 s instead of 0.6).
pub const ASIDE_AFTER: Duration = Duration::from_millis(10);

/// A head that is not there after this time is late. Most leave with the last packet of the TCP handshake, and are there when the
/// connection is accepted; a proxy that connects first and reads then, a slow link or a lost packet make it later.
pub const LATE_AFTER: Duration = Duration::from_millis(100);

/// Maximum number of handshakes aside for each place: with 500 places 4,000. Those that have sent nothing are not among them, unless memory
/// is short.
pub const ASIDE_PER_PLACE: usize = 8;
/// Maximum number of silent handshakes without a place for each free connection. One takes 3.5 KB (measured with 15,000); one that has
/// begun may take 25 KB. With four, a fleet of 15,000 devices that connects all its sockets first fits where the node may have 19,244
/// connections. Silent handshakes leave at least a fifth of what the sessions leave to others.
const SILENT_PER_FREE: usize = 4;
/// Time that any handshake has while others wait and there is no room aside: long enough for every link but the worst, and short enough that those
/// who never mean to finish, from however many addresses, give way to those who do.
const PRESSED_TIME_MAX: Duration = Duration::from_secs(1);
/// Time for the head of a connection that is refused by its address, whatever it asks for but `/readyz`. As long as a peer may
/// need to send one packet again (RFC 6298: 200 ms at least, in practice), since a balancer's probe may come from the same address.
pub const TURNED_HEAD_TIME_MAX: Duration = Duration::from_millis(500);

/// See [`Door::has_room`].
const ROOM_PART: usize = 100;

/// Refused connections whose peer gets time to read its answer; more are closed at once, as only a flood brings them.
const LINGERING_MAX: usize = 64;

/// How often it is published how many are under way.
const GAUGES_INTERVAL: Duration = Duration::from_secs(1);

/// How often addresses that stay away are forgotten, where handshakes by address are counted.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);

/// What all connections share.
pub struct Door {
    /// All places for handshakes.
    places: usize,
    /// All connections of the node.
    connections: usize,
    memory: Arc<Memory>,
    /// One for each handshake under way; given back when the head is complete.
    handshakes: Arc<Semaphore>,
    handshake_shares: Arc<FairShare>,
    /// One for each handshake that gave its place up and still has time.
    aside: Arc<Semaphore>,
    /// How many gave their place up and have sent nothing.
    silent: Arc<AtomicUsize>,
    connection_shares: Arc<FairShare>,
    /// Only where the operator set a figure.
    handshake_rate: Option<HandshakeRate>,
    pub(crate) lingering: Semaphore,
    pressure: Pressure,
    /// Every connection's task.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the process is about to end: whoever still waits for an answer gets one now.
    pub(crate) closing: CancellationToken,
}

/// What a connection holds until its head is complete.
pub struct Handshake {
    hold: Hold,
    /// It is one of the node's connections, too, and may become a session.
    has_connection: bool,
}

#[expect(dead_code, reason = "permits are held, and given back when they are dropped")]
enum Hold {
    /// The share is given back before the permit: whoever gets the permit next finds room in the shares, too. `None`: its address
    /// has its share of the places, and nothing but `/readyz` is answered.
    Place(Option<Share>, OwnedSemaphorePermit),
    Aside(OwnedSemaphorePermit),
    Silent(Silent),
}

/// One of the silent handshakes, counted until it is dropped.
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

/// What a handshake that is late shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// Go on: nobody waits because of it.
    Stay,
    /// Others wait because of its address, or because of it: it has to go.
    Leave,
}

impl Handshake {
    /// Its head takes long: its address gets no more than a fair share of the places.
    pub(crate) fn mark_slow(&mut self) {
        if let Hold::Place(Some(share), _) = &mut self.hold {
            share.mark_slow();
        }
    }
}

/// Why a connection gets no session, whatever it asks for. Its head is read all the same: a balancer may ask for `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// The node holds as many connections as it can: whoever reads the hello can give a slot.
    NodeFull,
    /// By a limit on its address.
    Address(Limit),
}

impl Turned {
    /// The limit on its address, where it is one.
    pub(crate) const fn limit(self) -> Option<Limit> {
        match self {
            Self::NodeFull => None,
            Self::Address(limit) => Some(limit),
        }
    }

    /// By how often and how slowly its address comes, not by how much is held.
    pub(crate) fn is_by_pace(self) -> bool {
        self.limit().is_some_and(|limit| match limit {
            Limit::AddressRate | Limit::AddressHandshakes => true,
            Limit::AddressConnections | Limit::Credential => false,
        })
    }
}

impl Door {
    pub fn new(bounds: Bounds, limits: &Limits, memory: Arc<Memory>) -> Self {
        let rate = limits.handshakes_per_second_per_address_max.and_then(NonZeroU32::new);
        Self {
            places: bounds.handshakes,
            connections: bounds.connections,
            memory,
            handshakes: Arc::new(Semaphore::new(bounds.handshakes)),
            handshake_shares: FairShare::new(bounds.handshakes, Scope::TheSlow, None),
            aside: Arc::new(Semaphore::new(bounds.handshakes * ASIDE_PER_PLACE)),
            silent: Arc::default(),
            connection_shares: FairShare::new(bounds.connections, Scope::Everyone, limits.connections_per_address_max),
            handshake_rate: rate.map(HandshakeRate::new),
            lingering: Semaphore::new(LINGERING_MAX),
            pressure: Pressure::new(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
        }
    }

    /// A place for one more handshake, once there is one.
    ///
    /// # Errors
    /// Never while the door is there.
    ///
    /// # Cancel safety
    /// Safe: dropped before it is ready, it has taken no place.
    pub async fn enter(&self) -> Result<OwnedSemaphorePermit, AcquireError> {
        if let Ok(permit) = Arc::clone(&self.handshakes).try_acquire_owned() {
            return Ok(permit);
        }
        self.pressure.note();
        let permit = Arc::clone(&self.handshakes).acquire_owned().await;
        self.pressure.note();
        permit
    }

    /// What becomes of a handshake that has shown no head for so long, at least [`ASIDE_AFTER`]. Where others wait it steps aside; one that has no connection of the node's does
    /// not, since those are what files are counted by.
    #[must_use]
    pub(crate) fn make_way(&self, handshake: &mut Handshake, elapsed: Duration, sent: Sent) -> Late {
        if let (Hold::Silent(_), Sent::Something) = (&handshake.hold, sent)
            && !self.try_begin(handshake)
        {
            return Late::Leave;
        }
        if !self.pressure.was_on_lately() {
            return Late::Stay;
        }
        let has_had_its_time = elapsed >= PRESSED_TIME_MAX;
        let (is_late_of_a_crowd, has_no_room) = match &handshake.hold {
            Hold::Aside(_) => (false, self.aside.available_permits() == 0),
            Hold::Silent(_) => (false, self.silent_max() < self.silent.load(Ordering::Relaxed)),
            Hold::Place(share, _) => {
                let is_of_a_crowd = || share.as_ref().is_none_or(Share::is_of_a_crowd);
                (elapsed >= LATE_AFTER && is_of_a_crowd(), true)
            }
        };
        let has_place = matches!(handshake.hold, Hold::Place(..));
        if has_place && handshake.has_connection && self.step_aside(handshake, sent) {
            return Late::Stay;
        }
        if is_late_of_a_crowd || has_had_its_time && has_no_room {
            Late::Leave
        } else {
            Late::Stay
        }
    }

    /// False where there is no room.
    fn step_aside(&self, handshake: &mut Handshake, sent: Sent) -> bool {
        let hold = match sent {
            // Where memory is short, silent ones have the same bound as the others.
            Sent::Nothing if self.memory.has_room() => self.take_silent().map(Hold::Silent),
            Sent::Nothing | Sent::Something => self.take_aside(),
        };
        hold.map(|hold| handshake.hold = hold).is_some()
    }

    /// Moves a silent handshake that has sent something to those that stand aside, since it is about to need memory. False where there is
    /// no room: it stays with the silent ones then.
    #[must_use]
    pub(crate) fn try_begin(&self, handshake: &mut Handshake) -> bool {
        if !matches!(handshake.hold, Hold::Silent(_)) {
            return true;
        }
        self.take_aside().map(|hold| handshake.hold = hold).is_some()
    }

    fn take_aside(&self) -> Option<Hold> {
        Arc::clone(&self.aside).try_acquire_owned().ok().map(Hold::Aside)
    }

    fn take_silent(&self) -> Option<Silent> {
        self.silent.fetch_add(1, Ordering::Relaxed);
        let silent = Silent(Arc::clone(&self.silent));
        (self.silent.load(Ordering::Relaxed) <= self.silent_max()).then_some(silent)
    }

    fn silent_max(&self) -> usize {
        let free = self.connections.saturating_sub(self.connection_shares.used());
        free.saturating_mul(SILENT_PER_FREE)
    }

    /// Runs a connection's task, tracked. A panic in it ends that connection alone: what the connection holds is given back as
    /// it unwinds, the panic is counted, and the first one is an alarm.
    pub fn spawn(self: &Arc<Self>, shared: &Shared, life: impl Future<Output = ()> + Send + 'static) {
        let shared = Arc::clone(shared);
        // Not an `async` block, whose future would hold `life` twice: as it was passed, and as it is awaited.
        let life = AssertUnwindSafe(life).catch_unwind().map(move |ended| {
            if ended.is_err() {
                shared.note_panic("the task of a device's connection");
            }
        });
        self.tasks.spawn(life);
    }

    /// Every connection of the node's is taken, or memory is short.
    pub(crate) fn is_full(&self) -> bool {
        self.connection_shares.used() >= self.connections || self.memory.is_full()
    }

    /// One in a hundred connections is free, so that a node at its bound does not come and go with each device; and memory is not short.
    pub(crate) fn has_room(&self) -> bool {
        let connections_max = self.connections - self.connections.div_ceil(ROOM_PART);
        self.connection_shares.used() <= connections_max && self.memory.has_room()
    }

    /// A head is complete.
    pub(crate) fn note_head(&self) {
        self.pressure.note_head();
    }

    /// Time that a handshake which is given up should stay away.
    pub(crate) fn hint_range(&self) -> RangeInclusive<Duration> {
        self.pressure
            .hint_range(self.under_way().iter().map(|(_, count)| count).sum())
    }

    /// Handshakes under way by what they hold: the label `state` of `seawall_handshakes_under_way`.
    fn under_way(&self) -> [(&'static str, usize); 3] {
        // By shares, not by permits: the listener holds a permit while nobody comes.
        let aside_max = self.places * ASIDE_PER_PLACE;
        [
            ("place", self.handshake_shares.used()),
            ("aside", aside_max.saturating_sub(self.aside.available_permits())),
            ("silent", self.silent.load(Ordering::Relaxed)),
        ]
    }

    /// Places among the node's connections that are taken.
    #[cfg(test)]
    pub fn connections_held(&self) -> usize {
        self.connection_shares.used()
    }

    /// What a connection from `network` needs, or why it can't have it, and the place in which its head is read either way. `None`:
    /// from a balancer, that will say whom it speaks for; then it is to be [settled](Self::settle).
    pub fn admit(&self, network: Option<Network>, permit: OwnedSemaphorePermit) -> (Result<Share, Turned>, Handshake) {
        let connection = self.take_connection(network);
        let share = self.handshake_shares.take(network).ok();
        let is_too_fast = || network.is_some_and(|network| self.is_too_fast(network));
        let place = match connection {
            Err(turned @ Turned::Address(_)) => Err(turned),
            Ok(_) | Err(Turned::NodeFull) if is_too_fast() => Err(Turned::Address(Limit::AddressRate)),
            Ok(_) | Err(Turned::NodeFull) if share.is_none() => Err(Turned::Address(Limit::AddressHandshakes)),
            place @ (Ok(_) | Err(Turned::NodeFull)) => place,
        };
        let handshake = Handshake {
            hold: Hold::Place(share, permit),
            has_connection: place.is_ok(),
        };
        (place, handshake)
    }

    /// A connection for a device that was turned away because its address comes too often or too slowly, and that has shown a right to
    /// come now. How many its address and the node may hold is as it was.
    pub fn readmit(&self, network: Network) -> Result<Share, Turned> {
        self.take_connection(Some(network))
    }

    fn take_connection(&self, network: Option<Network>) -> Result<Share, Turned> {
        self.connection_shares
            .take(network)
            .map_err(|exhausted| match exhausted {
                Exhausted::Bound => Turned::NodeFull,
                Exhausted::Address => Turned::Address(Limit::AddressConnections),
            })
    }
}

impl Door {
    /// Counts a connection for the address that its balancer has named, and its handshake too, while that is under way.
    pub fn settle(
        &self,
        place: Result<Share, Turned>,
        mut handshake: Option<&mut Handshake>,
        network: Network,
    ) -> Result<Share, Turned> {
        let settled = place.and_then(|connection| self.count_for(connection, handshake.as_deref_mut(), network));
        if let (Err(_), Some(handshake)) = (&settled, handshake) {
            handshake.has_connection = false;
        }
        settled
    }

    fn count_for(
        &self,
        mut connection: Share,
        handshake: Option<&mut Handshake>,
        network: Network,
    ) -> Result<Share, Turned> {
        let turned = |limit| Err(Turned::Address(limit));
        if connection.settle(network).is_err() {
            return turned(Limit::AddressConnections);
        }
        if self.is_too_fast(network) {
            return turned(Limit::AddressRate);
        }
        if let Some(Hold::Place(Some(share), _)) = handshake.map(|handshake| &mut handshake.hold)
            && share.settle(network).is_err()
        {
            return turned(Limit::AddressHandshakes);
        }
        Ok(connection)
    }

    fn is_too_fast(&self, network: Network) -> bool {
        self.handshake_rate.as_ref().is_some_and(|rate| !rate.allows(network))
    }
}

/// Never ready; publishes how many handshakes are under way.
#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are floating point, and these counts far below 2^53"
)]
pub async fn publish(door: Arc<Door>, metrics: Arc<Metrics>) {
    loop {
        sleep(GAUGES_INTERVAL).await;
        for (state, count) in door.under_way() {
            metrics.handshakes_under_way.set(state, count as f64);
        }
    }
}

/// Never ready; keeps the table of handshakes by address small, off the runtime's workers.
pub async fn forget_idle(door: Arc<Door>) {
    if door.handshake_rate.is_none() {
        std::future::pending::<()>().await;
    }
    loop {
        sleep(FORGET_INTERVAL).await;
        let door = Arc::clone(&door);
        let sweep = tokio::task::spawn_blocking(move || door.handshake_rate.as_ref().map(HandshakeRate::forget_idle));
        // Cancelled only where the runtime ends.
        let _ = sweep.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Sources;

    fn door(memory: &Arc<Memory>) -> Door {
        let bounds = Bounds {
            connections: 100,
            handshakes: 10,
        };
        Door::new(bounds, &Limits::default(), Arc::clone(memory))
    }

    /// Handshakes that have been without a head for [`ASIDE_AFTER`] while others wait, each of another address, until one has to keep its place.
    fn late_ones(door: &Door, sent: Sent) -> Vec<(Result<Share, Turned>, Handshake)> {
        door.pressure.note();
        let mut late = Vec::new();
        for address in 0.. {
            let permit = Arc::clone(&door.handshakes).try_acquire_owned().unwrap();
            let (connection, mut handshake) = door.admit(Some(Network::V4(address)), permit);
            assert_eq!(door.make_way(&mut handshake, ASIDE_AFTER, sent), Late::Stay);
            if matches!(handshake.hold, Hold::Place(..)) {
                break;
            }
            late.push((connection, handshake));
        }
        late
    }

    #[test]
    fn silent_handshakes_leave_a_fifth_of_the_connections_to_others() {
        let door = door(&Arc::default());

        let silent = late_ones(&door, Sent::Nothing);

        assert_eq!(silent.len(), 80);
        assert_eq!(door.under_way(), [("place", 0), ("aside", 0), ("silent", 80)]);
        drop(silent);
        assert_eq!(door.under_way(), [("place", 0), ("aside", 0), ("silent", 0)]);
    }

    #[test]
    fn a_silent_handshake_that_begins_needs_room_aside() {
        let door = door(&Arc::default());
        let mut silent = late_ones(&door, Sent::Nothing);
        let (_, handshake) = silent.last_mut().unwrap();

        assert_eq!(door.make_way(handshake, ASIDE_AFTER, Sent::Something), Late::Stay);
        assert_eq!(door.under_way(), [("place", 0), ("aside", 1), ("silent", 79)]);

        let _others: Vec<_> = std::iter::from_fn(|| door.take_aside()).collect();
        let (_, handshake) = silent.first_mut().unwrap();
        assert_eq!(door.make_way(handshake, ASIDE_AFTER, Sent::Something), Late::Leave);
    }

    #[test]
    fn silent_handshakes_that_have_had_a_second_give_connections_back_that_sessions_take() {
        let door = door(&Arc::default());
        let mut silent = late_ones(&door, Sent::Nothing);
        let (_, handshake) = &mut silent[0];
        assert_eq!(door.make_way(handshake, PRESSED_TIME_MAX, Sent::Nothing), Late::Stay);

        let _session = door.take_connection(Some(Network::V4(1_000))).unwrap();

        assert_eq!(door.make_way(handshake, ASIDE_AFTER, Sent::Nothing), Late::Stay);
        assert_eq!(door.make_way(handshake, PRESSED_TIME_MAX, Sent::Nothing), Late::Leave);
    }

    /// Of a process that has a byte, and uses more.
    fn memory_of_a_byte() -> Arc<Memory> {
        Arc::new(Memory::new(Sources::of(Vec::new(), 1, 1 << 40)))
    }

    #[test]
    fn node_is_full_where_memory_is_short_however_few_connections_it_holds() {
        let memory = memory_of_a_byte();
        let door = door(&memory);
        assert!(!door.is_full() && door.has_room());

        memory.look(0);

        assert!(door.is_full() && !door.has_room());
    }
}
