//! The live sessions of this node: device id to handle, fenced by epoch, each with a bounded mailbox.
//!
//! Start with [`Sessions`]. A newer session of a device replaces the older one; what the older one does later (its close, its
//! clean-up) never touches the newer, because every change names the epoch it means.

use std::{
    borrow::Borrow,
    collections::HashMap,
    future::poll_fn,
    hash::{Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use seawall_proto::{
    close::Close,
    cohorts::Past,
    epoch::SessionIds,
    id::{CredentialTag, DeviceId, Label, SessionId},
    time::{Instant, Tenths, WallTime},
};
use tokio::sync::oneshot;

use crate::fleet::{cohorts::Cohort, history::groups::Group};

/// Messages to one device that wait for its session task. A full mailbox answers 429 to the sender (`mailbox_full` in
/// `seawall_messages_total`).
pub const MAILBOX_LEN_MAX: usize = 16;
/// Shards of the map: a power of two, enough that two cores rarely meet on one lock.
const SHARDS: usize = 64;

/// What is known of a session for as long as it lives.
#[derive(Debug)]
pub struct SessionInfo {
    pub device: DeviceId,
    /// What the device calls itself, where that is not a UUID. Boxed, since few do.
    pub external_id: Option<Box<Label>>,
    /// Tenant, model and firmware version, shared by all devices that are alike. The registry may have given the device
    /// another tenant or model since it connected.
    pub group: Arc<Group>,
    /// What it has shown.
    pub credential: CredentialTag,
    /// The device speaks `seawall.v1`; otherwise its session is plain.
    pub speaks_v1: bool,
    /// Where it comes from, with [`port`](Self::port): 20 bytes, where a [`SocketAddr`] has 32.
    pub address: IpAddr,
    pub port: u16,
    /// For people. Spans are reckoned from [`opened_at`](Self::opened_at): the wall clock may be set.
    pub since: WallTime,
    pub opened_at: Instant,
}

impl SessionInfo {
    /// Model and firmware version that it claims.
    #[must_use]
    pub fn cohort(&self) -> &Arc<Cohort> {
        &self.group.cohort
    }

    /// The registry's tenant when it connected.
    #[must_use]
    pub fn tenant(&self) -> &Arc<str> {
        &self.group.tenant
    }

    /// Where it comes from.
    #[must_use]
    pub const fn peer(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

/// A session as others see it. Dropping the last handle means nothing: the session's task owns the socket.
#[derive(Debug)]
pub struct Session {
    pub id: SessionId,
    pub info: SessionInfo,
    /// Set once, where it began soon after another session of the device: the bits of its past before it, plus one.
    returned: AtomicU8,
    inbox: Mutex<Inbox>,
}

/// Small, since every session has one and few have anything in it.
#[derive(Debug, Default)]
struct Inbox {
    /// Only while there is any.
    mail: Option<Box<Mail>>,
    closed: bool,
    /// The time of [`Sessions::call_at`] has come.
    is_due: bool,
    /// The device was deleted: nothing of it is to be remembered.
    is_deleted: bool,
    /// Of the session's task, where it waits.
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Mail {
    close: Option<Close>,
    /// Oldest first.
    messages: Vec<Outgoing>,
}

impl Inbox {
    fn is_ending(&self) -> bool {
        self.closed || self.mail.as_ref().is_some_and(|mail| mail.close.is_some())
    }
}

/// A message on its way to a device.
#[derive(Debug)]
pub struct Outgoing {
    pub id: Box<str>,
    pub body: OutgoingBody,
    /// Told once how it went. Dropped without a word where the session ends first.
    pub done: oneshot::Sender<Delivery>,
}

/// What a message carries.
#[derive(Debug, Clone)]
pub enum OutgoingBody {
    /// JSON text: the payload of a `message` frame, or for a plain session the text of one text frame.
    Json(Box<str>),
    /// One binary frame of a plain session.
    Binary(Bytes),
}

impl OutgoingBody {
    /// `json` or `binary`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Json(_) => "json",
            Self::Binary(_) => "binary",
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Json(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How far a message came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Written to a plain session, which has no acknowledgements.
    Sent,
    /// The device acknowledged it.
    Acked,
}

/// Why a session's task is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// The mailbox holds something.
    Mail,
    /// The time of [`Sessions::call_at`] has come.
    Due,
}

/// What the session's task finds in its mailbox.
#[derive(Debug)]
pub enum Command {
    Close(Close),
    Deliver(Outgoing),
}

/// Why a message could not be posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    #[error("the device has no session on this node")]
    Offline,
    #[error("the device's mailbox is full")]
    MailboxFull,
}

impl Session {
    /// It began soon after another session of the device, with this past.
    pub fn set_returned(&self, past: Past) {
        self.returned.store(past.bits() + 1, Ordering::Relaxed);
    }

    /// The past of its device, if it began soon after another session.
    pub fn returned(&self) -> Option<Past> {
        let bits = self.returned.load(Ordering::Relaxed).checked_sub(1)?;
        Some(Past::of_bits(bits))
    }

    /// Orders the session to end. The first order counts; later ones are ignored.
    pub fn close(&self, order: Close) -> bool {
        let mut inbox = self.inbox();
        if inbox.is_ending() {
            return false;
        }
        inbox.mail.get_or_insert_default().close = Some(order);
        wake(inbox);
        true
    }

    /// Calls the session's task, as [`Sessions::call_at`] does.
    pub fn call(&self) {
        let mut inbox = self.inbox();
        inbox.is_due = true;
        wake(inbox);
    }

    /// Notes that the device was deleted from the registry.
    pub fn mark_deleted(&self) {
        self.inbox().is_deleted = true;
    }

    /// The device was deleted from the registry while it had this session.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.inbox().is_deleted
    }

    /// The session has been told to end.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.inbox().is_ending()
    }

    /// Puts a message into the mailbox.
    ///
    /// # Errors
    /// The mailbox is full, or the session is ending.
    pub fn post(&self, message: Outgoing) -> Result<(), PostError> {
        let mut inbox = self.inbox();
        if inbox.is_ending() {
            return Err(PostError::Offline);
        }
        let mail = inbox.mail.get_or_insert_default();
        if mail.messages.len() >= MAILBOX_LEN_MAX {
            return Err(PostError::MailboxFull);
        }
        mail.messages.push(message);
        wake(inbox);
        Ok(())
    }

    /// Ready where the mailbox holds something, or else the session's time has come, which is told once; otherwise the task of `cx` is
    /// woken then. For the session's task alone.
    pub fn poll_call(&self, cx: &Context<'_>) -> Poll<Call> {
        self.poll_inbox(cx, |inbox| {
            if inbox.mail.is_some() {
                return Some(Call::Mail);
            }
            std::mem::take(&mut inbox.is_due).then_some(Call::Due)
        })
    }

    /// As [`poll_call`](Self::poll_call), but messages wait: [`Call::Mail`] is an order to end.
    pub fn poll_order(&self, cx: &Context<'_>) -> Poll<Call> {
        self.poll_inbox(cx, |inbox| {
            if inbox.is_ending() {
                return Some(Call::Mail);
            }
            std::mem::take(&mut inbox.is_due).then_some(Call::Due)
        })
    }

    /// The next command; an order to close goes before messages.
    pub fn take(&self) -> Option<Command> {
        let mut inbox = self.inbox();
        let mail = inbox.mail.as_mut()?;
        let command = match mail.close.take() {
            Some(order) => Command::Close(order),
            None => Command::Deliver(mail.messages.remove(0)),
        };
        if mail.messages.is_empty() {
            inbox.mail = None;
        }
        inbox.closed |= matches!(command, Command::Close(_));
        Some(command)
    }

    /// Waits until the session is ordered to end. For the session's task alone.
    ///
    /// # Cancel safety
    /// Safe: whoever asks again is told the same.
    pub async fn ordered_to_close(&self) {
        poll_fn(|cx| self.poll_inbox(cx, |inbox| inbox.is_ending().then_some(()))).await;
    }

    fn poll_inbox<T>(&self, cx: &Context<'_>, look: impl FnOnce(&mut Inbox) -> Option<T>) -> Poll<T> {
        let mut inbox = self.inbox();
        if let Some(found) = look(&mut inbox) {
            return Poll::Ready(found);
        }
        if !inbox.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            inbox.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Nothing more is taken from or put into the mailbox. Whoever waits for a message in it hears that it was not delivered.
    fn shut(&self) {
        let mut inbox = self.inbox();
        inbox.closed = true;
        let undelivered = inbox.mail.take();
        // A waker keeps the memory of its task, and others may keep this session.
        let waker = inbox.waker.take();
        drop(inbox);
        drop((undelivered, waker));
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes the session's task, behind the lock: it looks into the mailbox at once.
fn wake(inbox: MutexGuard<'_, Inbox>) {
    let waker = inbox.waker.clone();
    drop(inbox);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// All live sessions of this node.
#[derive(Debug)]
pub struct Sessions {
    shards: Box<[Mutex<Shard>]>,
    ids: Mutex<SessionIds>,
    len: Arc<AtomicUsize>,
}

/// Sessions by device, each with the time at which it is to be called.
type Shard = HashMap<ByDevice, Tenths>;

/// A session that is found by its device's id, which it holds itself.
#[derive(Debug)]
struct ByDevice(Arc<Session>);

impl Borrow<DeviceId> for ByDevice {
    fn borrow(&self) -> &DeviceId {
        &self.0.info.device
    }
}

impl PartialEq for ByDevice {
    fn eq(&self, other: &Self) -> bool {
        self.0.info.device == other.0.info.device
    }
}

impl Eq for ByDevice {}

/// As the id, by which it is found.
impl Hash for ByDevice {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.info.device.hash(state);
    }
}

/// What [`Sessions::register`] did.
pub struct Registered {
    pub session: Arc<Session>,
    /// A session of the same device that this one replaced; it has been told to close.
    pub replaced: Option<Arc<Session>>,
}

impl Sessions {
    #[must_use]
    pub fn new(ids: SessionIds) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            ids: Mutex::new(ids),
            len: Arc::default(),
        }
    }

    /// The number of sessions, to be shared.
    #[must_use]
    pub fn counter(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.len)
    }

    /// The source of ids. Locked for as long as it is held.
    pub fn ids(&self) -> MutexGuard<'_, SessionIds> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a session the one session of its device, and tells an older one to close (4500). Its id is greater than
    /// `known`, the greatest epoch that is known of the device, on whichever node.
    ///
    /// `tell` runs before anybody else's session of the device can come or go, so that what it says is said in order: it
    /// must be quick, and not ask for sessions.
    pub fn register(&self, info: SessionInfo, known: SessionId, tell: impl FnOnce(&Registered)) -> Registered {
        let device = info.device;
        info.cohort().session_opened();
        let mut shard = self.shard(device);
        // Behind the lock: whichever session of the device comes later has the greater id.
        let id = {
            let mut ids = self.ids();
            ids.observe(known, info.since);
            ids.next(info.since)
        };
        let session = Arc::new(Session {
            id,
            info,
            returned: AtomicU8::new(0),
            inbox: Mutex::default(),
        });
        let replaced = shard.remove_entry(&device).map(|(ByDevice(older), _)| older);
        shard.insert(ByDevice(Arc::clone(&session)), Tenths::FAR_FUTURE);
        match &replaced {
            Some(older) => {
                older.info.cohort().session_closed();
                older.close(Close::Replaced);
            }
            None => {
                self.len.fetch_add(1, Ordering::Relaxed);
            }
        }
        let registered = Registered { session, replaced };
        tell(&registered);
        drop(shard);
        registered
    }

    /// Removes a session, if it is still its device's newest, and then tells of it, as in [`register`](Self::register).
    /// Returns whether it was. What lies in its mailbox is dropped in any case: it won't be sent.
    pub fn unregister(&self, session: &Session, tell: impl FnOnce()) -> bool {
        session.shut();
        let mut shard = self.shard(session.info.device);
        let is_newest = shard
            .get_key_value(&session.info.device)
            .is_some_and(|(newest, _)| newest.0.id == session.id);
        if is_newest {
            shard.remove(&session.info.device);
            session.info.cohort().session_closed();
            self.len.fetch_sub(1, Ordering::Relaxed);
            tell();
        }
        is_newest
    }

    #[must_use]
    pub fn get(&self, device: DeviceId) -> Option<Arc<Session>> {
        let shard = self.shard(device);
        shard.get_key_value(&device).map(|(session, _)| Arc::clone(&session.0))
    }

    /// Has a session's task [called](Session::poll_call) once it is `at`, instead of any time named before. A session that is no
    /// longer its device's newest is not called: it has been told to close.
    pub fn call_at(&self, session: &Session, at: Tenths) {
        let mut shard = self.shard(session.info.device);
        let is_newest = shard
            .get_key_value(&session.info.device)
            .is_some_and(|(newest, _)| newest.0.id == session.id);
        if is_newest && let Some(due) = shard.get_mut(&session.info.device) {
            *due = at;
        }
    }

    /// Calls the sessions whose time has come.
    pub fn call_due(&self, now: Instant) {
        let now = Tenths::begun(now);
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (session, due) in shard.iter_mut().filter(|(_, due)| **due <= now) {
                *due = Tenths::FAR_FUTURE;
                session.0.call();
            }
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shows every session, shard by shard, in no order. No session of the shard comes or goes meanwhile: `each` must be quick.
    pub fn for_each(&self, mut each: impl FnMut(&Session)) {
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.keys().for_each(|session| each(&session.0));
        }
    }

    /// A session of each shard that has one: at most 64 devices, by no property of theirs.
    pub fn sample(&self) -> impl Iterator<Item = DeviceId> {
        self.shards.iter().filter_map(|shard| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.keys().next().map(|session| session.0.info.device)
        })
    }

    /// The sessions for which `wanted` holds, copied shard by shard, in the order of device ids.
    pub fn matching(&self, mut wanted: impl FnMut(&Session) -> bool) -> Vec<Arc<Session>> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let sessions = shard.keys().map(|session| &session.0);
            found.extend(sessions.filter(|session| wanted(session)).cloned());
        }
        found.sort_unstable_by_key(|session| session.info.device);
        found
    }

    fn shard(&self, device: DeviceId) -> MutexGuard<'_, Shard> {
        let bytes = device.as_bytes();
        let index = usize::from(bytes[15] ^ bytes[7] ^ bytes[3]) % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use seawall_proto::{
        epoch::NodeTag,
        id::{Credential, SecretHash},
    };

    use super::*;
    use crate::fleet::{cohorts::Cohorts, history::groups::Groups};

    #[test]
    fn a_second_session_replaces_the_first() {
        let (sessions, cohorts) = rig();

        let first = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;
        let second = sessions.register(info(&cohorts, 1), SessionId(0), |_| {});

        assert!(matches!(first.take(), Some(Command::Close(Close::Replaced))));
        assert_eq!(second.replaced.map(|older| older.id), Some(first.id));
        assert!(second.session.id > first.id);
        assert_eq!(sessions.len(), 1);
    }

    #[test]
    fn session_is_newer_than_what_a_node_with_a_clock_ahead_has_reported() {
        let (sessions, cohorts) = rig();
        let hour_ahead = WallTime::from_unix_ms(3_600_000);
        let known = SessionIds::new(NodeTag(9), None).next(hour_ahead);

        let session = sessions.register(info(&cohorts, 1), known, |_| {}).session;

        assert!(session.id > known);
    }

    #[test]
    fn a_late_close_does_not_evict_the_newer_session() {
        let (sessions, cohorts) = rig();
        let first = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;
        let second = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;

        assert!(!sessions.unregister(&first, || {}));

        assert_eq!(sessions.get(device(1)).map(|session| session.id), Some(second.id));
        assert!(sessions.unregister(&second, || {}));
        assert!(!sessions.unregister(&second, || {}));
        assert!(sessions.is_empty());
    }

    #[test]
    fn cohort_counts_follow_the_newest_session_only() {
        let (sessions, cohorts) = rig();
        let first = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;
        let second = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;

        assert_eq!(second.info.cohort().sessions(), 1);
        sessions.unregister(&first, || {});
        assert_eq!(second.info.cohort().sessions(), 1);
        sessions.unregister(&second, || {});
        assert_eq!(second.info.cohort().sessions(), 0);
    }

    #[test]
    fn a_full_mailbox_refuses_and_a_close_still_goes_first() {
        let (sessions, cohorts) = rig();
        let session = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;
        let message = || Outgoing {
            id: "m".into(),
            body: OutgoingBody::Json("{}".into()),
            done: oneshot::channel().0,
        };
        for _ in 0..MAILBOX_LEN_MAX {
            session.post(message()).unwrap();
        }

        assert_eq!(session.post(message()), Err(PostError::MailboxFull));
        assert!(session.close(Close::Revoked));
        assert!(!session.close(Close::Replaced), "the first order counts");

        assert!(matches!(session.take(), Some(Command::Close(Close::Revoked))));
        assert_eq!(session.post(message()), Err(PostError::Offline));
    }

    #[test]
    fn messages_in_the_mailbox_of_a_session_that_ends_are_known_to_be_undelivered() {
        let (sessions, cohorts) = rig();
        let session = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;
        let (done, mut delivery) = oneshot::channel();
        let message = Outgoing {
            id: "m".into(),
            body: OutgoingBody::Json("{}".into()),
            done,
        };
        session.post(message).unwrap();

        sessions.unregister(&session, || {});

        assert!(matches!(delivery.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert!(session.take().is_none());
    }

    #[test]
    fn a_session_is_called_once_when_its_time_has_come_and_no_longer_once_it_is_replaced() {
        let (sessions, cohorts) = rig();
        let cx = Context::from_waker(Waker::noop());
        let instant = |tenths: u64| Instant::from_micros(tenths * 100_000);
        let at = |tenths| Tenths::begun(instant(tenths));
        let first = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;
        let called = |session: &Session| session.poll_call(&cx);

        sessions.call_at(&first, at(100));
        sessions.call_due(instant(99));
        assert_eq!(called(&first), Poll::Pending);
        sessions.call_due(instant(100));
        assert_eq!(called(&first), Poll::Ready(Call::Due));
        sessions.call_due(instant(200));
        assert_eq!(called(&first), Poll::Pending);

        let second = sessions.register(info(&cohorts, 1), SessionId(0), |_| {}).session;
        sessions.call_at(&first, at(300));
        sessions.call_due(instant(300));
        assert_eq!(called(&second), Poll::Pending);
        assert_eq!(called(&first), Poll::Ready(Call::Mail), "it has been told to close");
    }

    fn rig() -> (Sessions, Cohorts) {
        (Sessions::new(SessionIds::new(NodeTag(1), None)), Cohorts::new())
    }

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }

    fn info(cohorts: &Cohorts, n: u128) -> SessionInfo {
        SessionInfo {
            external_id: None,
            device: device(n),
            group: Groups::default().of(&cohorts.intern(None, Some("1.0")), &"default".into(), None),
            credential: (&Credential::from(SecretHash::of(b"secret"))).into(),
            speaks_v1: true,
            address: IpAddr::from([127, 0, 0, 1]),
            port: 1,
            since: WallTime::from_unix_ms(1),
            opened_at: Instant::ZERO,
        }
    }
}
