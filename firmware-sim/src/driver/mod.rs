//! Real sockets for device machines: one task per device, from its first attempt to its end.
//!
//! [`Driver::spawn`] starts a device, [`DeviceHandle`] controls it, and an [`Observer`] gets its events. [`Device`]
//! decides when to connect, what to obey and how long to wait.

mod commands;
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

use self::{
    commands::{Absence, Commands},
    task::DeviceTask,
};
pub use crate::handshake::Refused;
use crate::{
    device::{Device, Patience},
    handshake::{Credential, SUBPROTOCOL, SocketOptions},
    identity::Identity,
    profile::Profile,
    target::Target,
};

/// An event of a device.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// It starts to connect. `intended`: when it meant to, so that the delay of a busy machine shows.
    Attempt { intended: Instant },
    /// The gateway answered 101.
    Connected,
    /// The gateway refused it.
    Refused(&'a Refused),
    /// No answer: no TCP connection, a reset, silence, no HTTP; or the attempt was given up on an order.
    /// `is_local`: this machine had no socket left for it, so that the gateway never saw it.
    Failed { is_local: bool },
    /// A session ended. `code`: of the close frame that came; `None` where none did. `by_device`: the device ended it, as its
    /// profile does or by an order; otherwise the gateway or the network did, or the device took them for gone.
    Closed { code: Option<u16>, by_device: bool },
    /// It was told not to return on its own. Comes after `Closed`.
    Stopped { code: u16 },
    /// It got a message, and acknowledges it.
    Message,
    /// It got an update notice, in a restricted session.
    Update,
    /// It sent a message of its own.
    Sent,
    /// The gateway acknowledged one of its messages.
    Acked,
}

/// Gets the events of all devices, from many threads. It must be quick and must not block.
pub trait Observer: Send + Sync + 'static {
    /// `device` is the number that the device was spawned with.
    fn observe(&self, device: usize, event: Event<'_>, now: Instant);
}

/// One device to run.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    /// Number of the device in events.
    pub number: usize,
    pub identity: Identity,
    /// `None`: it sends no version.
    pub firmware: Option<Arc<str>>,
    pub profile: Profile,
    /// When it first connects, from the driver's start. `None`: when it is [restarted](DeviceHandle::restart).
    pub first_attempt_after: Option<Duration>,
    /// Local address. `None`: the system's choice.
    pub source: Option<IpAddr>,
    /// Seed of its random waits.
    pub seed: u64,
    /// Time limits of its attempts.
    pub patience: Patience,
    /// Time between two messages that it sends while it is connected. `None`: it sends none.
    pub messages_every: Option<Duration>,
    /// Whether it shows the resume token that it has. Devices older than resume tokens do not.
    pub resumes: bool,
}

/// Runs devices against one gateway.
pub struct Driver {
    context: Arc<Context>,
    tasks: TaskTracker,
    commands: Mutex<Vec<Arc<Commands>>>,
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
    /// Returns a driver without devices. Its time begins now.
    #[must_use]
    pub fn new(target: Target, observer: Arc<dyn Observer>) -> Self {
        Self {
            context: Arc::new(Context {
                target,
                observer,
                origin: tokio::time::Instant::now(),
            }),
            tasks: TaskTracker::new(),
            commands: Mutex::default(),
        }
    }

    /// Time since the driver began, as in events.
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
        let commands = Arc::new(Commands::new(spec.firmware.clone()));
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&commands));
        let task = Box::new(DeviceTask {
            context: Arc::clone(&self.context),
            commands: Arc::clone(&commands),
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
            absence: None,
            is_ending: false,
        });
        self.tasks.spawn(task.live());
        DeviceHandle(commands)
    }

    /// Ends all devices: open sessions say goodbye (1000), attempts are given up. Over in about [`GOODBYE_MAX`], or, where
    /// a gateway takes nothing any more, [`SEND_MAX`].
    pub async fn stop(&self) {
        for commands in self.commands.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            commands.end();
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

/// Controls one device. Commands take effect in the device's own task, at once if it runs. A later restart replaces one that
/// the device has not seen yet.
#[derive(Clone, Debug)]
pub struct DeviceHandle(Arc<Commands>);

impl DeviceHandle {
    /// Resets the connection, without a close frame. The device returns as its profile does. Does nothing to a device
    /// without a connection.
    pub fn drop_connection(&self) {
        self.0.drop_connection();
    }

    /// Closes the session with 1000. The device stays away until it is restarted.
    pub fn leave(&self) {
        self.0.go_away(Absence::Leave);
    }

    /// Cuts the device's power or its network: it neither reads nor writes, and its socket stays open until it is
    /// restarted. A device without a connection stays away until then.
    pub fn cut_power(&self) {
        self.0.go_away(Absence::PowerCut);
    }

    /// Restarts the device: it resets an open connection, and connects `after` from now. A device that was told not to
    /// return stays away.
    pub fn restart(&self, after: Duration) {
        self.0.restart(after);
    }

    /// Restarts the device with another firmware version.
    pub fn upgrade(&self, firmware: Option<Arc<str>>, after: Duration) {
        self.0.upgrade(firmware, after);
    }
}
