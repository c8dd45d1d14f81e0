//! Real sockets for device machines: one task a device, from its first attempt to the end.
//!
//! [`Driver::spawn`] starts a device, [`DeviceHandle`] steers it, an [`Observer`] is told what happens. No policy lives
//! here: when to connect, what to obey and how long to wait is [`Device`]'s.

mod lever;
mod session;
mod task;

use std::{
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::{SeedableRng, rngs::SmallRng};
use seawall_proto::time::Instant;
use tokio_util::task::TaskTracker;

use self::{lever::Lever, task::DeviceTask};
pub use crate::handshake::Refused;
use crate::{
    device::{Device, Patience},
    handshake::{Credential, SUBPROTOCOL, SocketOptions},
    identity::Identity,
    profile::Profile,
    target::Target,
};

/// What a device tells of itself.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// It begins to connect. `intended` is when it meant to: a machine that is too busy to start it in time can't hide that.
    Attempt { intended: Instant },
    /// The gateway answered 101.
    Connected,
    /// The gateway answered, and said no.
    Refused(&'a Refused),
    /// No answer: no TCP connection, a reset, silence, no HTTP; or the attempt was given up on an order.
    Failed,
    /// A session ended. `code`: of the close frame that came; `None` where none did. `by_device`: the device ended it, as its
    /// profile does or by an order; otherwise the gateway or the network did, or the device took them for gone.
    Closed { code: Option<u16>, by_device: bool },
    /// It was told not to come back by itself. Comes after `Closed`.
    Stopped { code: u16 },
    /// It has a message of the gateway's, and acks it.
    Message,
    /// It sent a message of its own.
    Sent,
    /// The gateway acked one.
    Acked,
}

/// Is told everything that devices do, from many threads: it must be quick and must not block.
pub trait Observer: Send + Sync + 'static {
    /// `device` is the number that the device was spawned with.
    fn observe(&self, device: usize, event: Event<'_>, now: Instant);
}

/// One device to run.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    /// What the observer knows it by.
    pub number: usize,
    pub identity: Identity,
    /// `None`: it names no version.
    pub firmware: Option<Arc<str>>,
    pub profile: Profile,
    /// When it first connects, from the driver's start. `None`: when it is [restarted](DeviceHandle::restart).
    pub first_attempt_after: Option<Duration>,
    /// Local address. `None`: the system's choice.
    pub source: Option<IpAddr>,
    /// Of its own chance. The same seed draws the same waits.
    pub seed: u64,
    /// How long its attempts may take.
    pub patience: Patience,
    /// Between two messages that it sends while it is connected. `None`: it sends none.
    pub messages_every: Option<Duration>,
    /// Whether it shows the resume token that it has. Devices of before resume tokens don't.
    pub resumes: bool,
}

/// Runs devices against one gateway.
pub struct Driver {
    context: Arc<Context>,
    tasks: TaskTracker,
    levers: Mutex<Vec<Arc<Lever>>>,
}

/// What all devices of a driver share.
struct Context {
    target: Target,
    observer: Arc<dyn Observer>,
    origin: tokio::time::Instant,
}

impl Context {
    fn now(&self) -> Instant {
        Instant::ZERO + self.origin.elapsed()
    }

    fn at(&self, instant: Instant) -> tokio::time::Instant {
        self.origin + instant.saturating_since(Instant::ZERO)
    }
}

impl Driver {
    /// A driver without devices. Its time begins now.
    #[must_use]
    pub fn new(target: Target, observer: Arc<dyn Observer>) -> Self {
        Self {
            context: Arc::new(Context {
                target,
                observer,
                origin: tokio::time::Instant::now(),
            }),
            tasks: TaskTracker::new(),
            levers: Mutex::default(),
        }
    }

    /// Time since the driver began, as observers are told it.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.context.now()
    }

    /// Starts a device. It lives until [`stop`](Self::stop), whether or not its handle is kept.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn(&self, spec: DeviceSpec) -> DeviceHandle {
        let first_attempt_at = spec
            .first_attempt_after
            .map_or(Instant::FAR_FUTURE, |after| Instant::ZERO + after);
        let device = Device::new(spec.profile, first_attempt_at).with_patience(spec.patience);
        let lever = Arc::new(Lever::new(spec.firmware.clone()));
        self.levers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&lever));
        let task = Box::new(DeviceTask {
            context: Arc::clone(&self.context),
            lever: Arc::clone(&lever),
            device,
            rng: SmallRng::seed_from_u64(spec.seed),
            number: spec.number,
            id: spec.identity.id,
            external_id: spec.identity.external_id,
            credential: Credential::Bearer(spec.identity.secret),
            tenant: spec.identity.tenant,
            model: spec.identity.model,
            firmware: spec.firmware,
            socket: SocketOptions {
                source: spec.source,
                is_slow: spec.profile == Profile::SlowReader,
            },
            messages_every: spec.messages_every,
            resumes: spec.resumes,
            is_ending: false,
        });
        self.tasks.spawn(task.live());
        DeviceHandle(lever)
    }

    /// Ends all devices: open sessions say goodbye (1000), attempts are given up. Over in about [`GOODBYE_MAX`], or, where
    /// a gateway takes nothing any more, [`SEND_MAX`].
    pub async fn stop(&self) {
        for lever in self.levers.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            lever.end();
        }
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("target", &self.context.target)
            .field("devices", &self.tasks.len())
            .finish_non_exhaustive()
    }
}

/// A gateway has this long to answer a close frame, and to close its socket after one.
pub const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// A frame that the socket does not take for this long ends the session.
pub const SEND_MAX: Duration = Duration::from_secs(10);

/// Steers one device. Orders take effect in the device's own task, at once if it runs; of orders not yet seen, the last
/// restart counts.
#[derive(Clone, Debug)]
pub struct DeviceHandle(Arc<Lever>);

impl DeviceHandle {
    /// Its connection breaks now: reset, no close frame. The device comes back as its profile does. One that has no
    /// connection is left alone.
    pub fn drop_connection(&self) {
        self.0.drop_connection();
    }

    /// It starts anew, and connects `after` from now; an open connection is reset. A device that was told not to come back
    /// stays away.
    pub fn restart(&self, after: Duration) {
        self.0.restart(after);
    }

    /// Its firmware is another now, and it starts anew with it.
    pub fn upgrade(&self, firmware: Option<Arc<str>>, after: Duration) {
        self.0.upgrade(firmware, after);
    }
}
