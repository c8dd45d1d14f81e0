//! Resume tokens on this node: issued for sessions, verified when a device reconnects, and revoked.
//!
//! A revocation through this node applies before its caller is answered; one made elsewhere is found by polling the
//! revision. Known revocations are also on disk, so that a start without a database rejects revoked tokens. Without
//! known revocations no token is valid. `seawall_proto::resume` decides; the statements are in [`crate::store`].

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use seawall_proto::{
    hello::Hello,
    id::{DeviceId, SessionId},
    resume::{
        Generation, Grant, Minted, Offered, REVOKED_MAX, ResumeKeys, Revalidations, Revoked, STALE_AFTER, Verifier,
    },
    time::Instant,
};
use tokio::sync::Notify;

use crate::{
    runtime::clock::Clock,
    store::{Store, StoreError, StoredRevocations},
};

mod journal;

use self::journal::{Journal, Line};

/// Maximum time of a handshake that had read the registry before a change. Sessions that began meanwhile are checked
/// again.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(4);

/// Time for which an older registry is reported: operators repeat what it has lost within a day.
const OLDER_SHOWN: Duration = Duration::from_hours(24);

/// Maximum number of changed devices whose sessions wait for a check. Beyond it the oldest are dropped: their sessions
/// stay.
const CHANGED_MAX: usize = 2 * REVOKED_MAX;

/// The resume tokens of this node.
pub struct Resume {
    keys: ResumeKeys,
    /// Zero: tokens are neither issued nor accepted.
    life: Duration,
    revoked: RwLock<Revoked>,
    /// Time at which the database last confirmed them, in microseconds of the process clock; `u64::MAX` before the
    /// first time.
    confirmed_at: AtomicU64,
    /// Whether revocations are known, or cannot be read until a person repairs the database.
    had_contact: AtomicBool,
    /// When the registry was found older than it had been, in microseconds of the process clock; `u64::MAX` for never.
    older_at: AtomicU64,
    /// Locked while the database is read.
    loading: tokio::sync::Mutex<()>,
    journal: Journal,
    /// Notified when the database must be read at once.
    pub(crate) news: Notify,
    /// Changed devices, each with the time from which its session is checked.
    changed: Mutex<VecDeque<(Instant, DeviceId)>>,
    recheck: Mutex<Recheck>,
    revalidations: Mutex<Revalidations<Case>>,
    pub(crate) drawn: Notify,
}

/// A check of all sessions, after more devices changed than are listed.
#[derive(Default)]
pub(crate) struct Recheck {
    due: Option<Instant>,
    /// Devices that the current check has not reached.
    pub(crate) rest: Vec<DeviceId>,
}

/// A device that a token admitted, to be looked up.
pub(crate) struct Case {
    pub(crate) grant: Grant,
    pub(crate) session: SessionId,
}

impl Resume {
    /// Starts from the revocations on disk. Without them no token is valid until the database has answered.
    #[must_use]
    pub fn open(data_dir: &Path, keys: ResumeKeys, life: Duration) -> Self {
        let journal = Journal::new(data_dir);
        let revoked = match journal.read() {
            Ok(kept) => kept,
            Err(error) => {
                tracing::error!(%error, file = %journal.path().display(), "file of revocations not readable: no resume token is accepted until the database answers");
                None
            }
        };
        Self {
            keys,
            life,
            had_contact: AtomicBool::new(revoked.is_some()),
            revoked: RwLock::new(revoked.unwrap_or_else(Revoked::unknown)),
            confirmed_at: AtomicU64::new(u64::MAX),
            older_at: AtomicU64::new(u64::MAX),
            loading: tokio::sync::Mutex::default(),
            journal,
            news: Notify::new(),
            changed: Mutex::default(),
            recheck: Mutex::default(),
            revalidations: Mutex::default(),
            drawn: Notify::new(),
        }
    }

    /// Whether a device shows a valid token, beside its credential.
    #[must_use]
    pub fn is_shown_by(&self, hello: &Hello, clock: &Clock) -> bool {
        let (Some(token), Some(credential)) = (&hello.resume, &hello.credential) else {
            return false;
        };
        self.with_verifier(clock, |verifier| {
            let verified = verifier.verify(hello.device, credential, token, clock.wall());
            verified.is_ok()
        })
    }

    /// Verifies tokens with the current revocations. No change of them takes effect before `verify` returns.
    pub fn with_verifier<T>(&self, clock: &Clock, verify: impl FnOnce(Verifier<'_>) -> T) -> T {
        let revoked = self.revoked();
        let nothing = Revoked::unknown();
        verify(Verifier {
            keys: &self.keys,
            revoked: if self.life.is_zero() { &nothing } else { &revoked },
            is_stale: self.is_stale(clock.now()),
        })
    }

    /// Revision up to which all revocations are known. Read it before a lookup is sent.
    #[must_use]
    pub fn known(&self) -> Generation {
        self.revoked().known()
    }

    /// Issues a token for a device's session. `None` if tokens are off, or if the device changed since it was
    /// authenticated.
    pub fn mint(&self, grant: &mut Grant, session: SessionId, clock: &Clock) -> Option<Minted> {
        if self.life.is_zero() || !grant.refresh(&self.revoked()) {
            return None;
        }
        grant.mint(&self.keys, session, self.life, clock.wall())
    }

    /// Whether no revocation concerns the device since its grant.
    pub(crate) fn allows(&self, grant: &Grant) -> bool {
        self.revoked().allows(grant.device, grant.generation)
    }

    /// Draws whether a device that a token admitted is looked up. Returns `false` if too many wait for that.
    pub fn offer_revalidation(&self, grant: &Grant, session: SessionId) -> bool {
        let case = || Case {
            grant: grant.clone(),
            session,
        };
        match self.revalidations().offer(case, &mut rand::rng()) {
            Offered::NotDrawn => true,
            Offered::Waiting => {
                self.drawn.notify_one();
                true
            }
            Offered::Full => false,
        }
    }

    /// A device was changed in the registry, or may have been. When this returns its earlier tokens are invalid, here
    /// and on disk; on other nodes after their next poll.
    pub async fn revoke(&self, device: DeviceId) {
        let at = self.change(|revoked| revoked.revoke_now(device));
        self.journal.queue([Line::revoked(device, at)]);
        self.persist().await;
        // Until the revision of the change is known, the device gets no token.
        self.news.notify_one();
    }

    /// Reads new revocations from the database.
    ///
    /// # Errors
    /// The database cannot be read; the known revocations stay.
    pub async fn poll(&self, store: &Store, clock: &Clock) -> Result<(), StoreError> {
        let polled = self.read(store, clock).await;
        // A record that can't be read until a person repairs it must not keep a node unready: devices are looked up.
        let is_lasting = |error: &StoreError| store.is_ready() && !error.is_retryable();
        let had_contact = polled.as_ref().err().is_none_or(is_lasting);
        self.had_contact.fetch_or(had_contact, Ordering::Release);
        polled
    }

    /// Whether tokens are accepted, unless the database has no readable record of revocations. Before that, a device
    /// would be looked up although it shows one.
    #[must_use]
    pub fn had_contact(&self) -> bool {
        self.had_contact.load(Ordering::Acquire)
    }

    async fn read(&self, store: &Store, clock: &Clock) -> Result<(), StoreError> {
        let _one_at_a_time = self.loading.lock().await;
        let (known, floor) = (self.revision(), self.revoked().floor());
        let mut stored = store.revocations_since(known).await?;
        if let Some(known) = known.filter(|known| *known > stored.revision) {
            tracing::warn!(
                revision = stored.revision.0,
                known = known.0,
                "registry is older than this node's last view of it: earlier resume tokens are no longer valid"
            );
            self.older_at.store(clock.now().as_micros(), Ordering::Relaxed);
            store.revoke_all_tokens(known).await?;
            stored = store.revocations_since(Some(known)).await?;
        }
        let is_news = known != Some(stored.revision) || stored.floor > floor;
        if is_news {
            self.take(&stored, known);
            let now = clock.now();
            let changed = || stored.devices.iter().map(|(device, _)| *device);
            self.note_changed(changed(), now);
            self.note_changed(changed(), now + HANDSHAKE_MAX);
            let has_unlisted = |known| stored.unlisted > known || stored.devices.len() >= REVOKED_MAX;
            if known.is_some_and(has_unlisted) {
                self.recheck().due = Some(now + HANDSHAKE_MAX);
            }
            self.persist().await;
        }
        self.confirmed_at.store(clock.now().as_micros(), Ordering::Relaxed);
        Ok(())
    }

    fn take(&self, stored: &StoredRevocations, known: Option<Generation>) {
        self.change(|revoked| {
            if known.is_none() {
                *revoked = Revoked::of(Generation(0), stored.floor, []);
            }
            for (device, at) in &stored.devices {
                revoked.revoke(*device, *at);
            }
            revoked.raise(stored.floor);
            let oldest = stored.devices.iter().map(|(_, at)| *at).min();
            if let Some(oldest) = oldest.filter(|_| stored.devices.len() >= REVOKED_MAX) {
                // Older ones may be missing.
                revoked.raise(oldest);
            }
            revoked.confirm(stored.revision);
            let devices = stored.devices.iter().map(|(device, at)| Line::revoked(*device, *at));
            self.journal.queue(devices.chain([Line::known(revoked)]));
            if known.is_none() {
                self.journal.queue_whole();
            }
        });
        tracing::debug!(
            revision = stored.revision.0,
            devices = stored.devices.len(),
            "revocations taken"
        );
    }

    /// Records devices whose sessions are checked from `due` on.
    pub(crate) fn note_changed(&self, devices: impl IntoIterator<Item = DeviceId>, due: Instant) {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        changed.extend(devices.into_iter().map(|device| (due, device)));
        let surplus = changed.len().saturating_sub(CHANGED_MAX);
        changed.drain(..surplus);
    }

    /// Removes the devices whose time has come. Returns up to `most` of them that are `wanted`.
    pub(crate) fn take_changed(&self, now: Instant, most: usize, wanted: impl Fn(DeviceId) -> bool) -> Vec<DeviceId> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = Vec::new();
        let mut later = VecDeque::new();
        for (due, device) in changed.drain(..) {
            if due > now || taken.len() >= most {
                later.push_back((due, device));
            } else if wanted(device) {
                taken.push(device);
            }
        }
        *changed = later;
        taken
    }

    /// Whether a check of all sessions is due now. The caller then sets the devices of all sessions.
    pub(crate) fn begin_recheck(&self, now: Instant) -> bool {
        let mut recheck = self.recheck();
        let is_due = recheck.rest.is_empty() && recheck.due.is_some_and(|due| due <= now);
        if is_due {
            recheck.due = None;
        }
        is_due
    }

    /// The next devices to check, at most `most`.
    pub(crate) fn next_to_recheck(&self, most: usize) -> Vec<DeviceId> {
        let mut recheck = self.recheck();
        let at = recheck.rest.len().saturating_sub(most);
        recheck.rest.split_off(at)
    }

    pub(crate) fn recheck(&self) -> MutexGuard<'_, Recheck> {
        self.recheck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn persist(&self) {
        self.journal.persist(|| journal::whole(&self.revoked())).await;
    }

    /// Whether the registry was older than what this node had seen of it, within the last 24 h.
    pub(crate) fn saw_older_registry(&self, now: Instant) -> bool {
        let at = self.older_at.load(Ordering::Relaxed);
        at != u64::MAX && now.saturating_since(Instant::from_micros(at)) < OLDER_SHOWN
    }

    /// Time since the database last confirmed the revocations; since the start if it never did.
    #[must_use]
    pub fn age(&self, now: Instant) -> Duration {
        match self.confirmed_at.load(Ordering::Relaxed) {
            u64::MAX => now.saturating_since(Instant::ZERO),
            at => now.saturating_since(Instant::from_micros(at)),
        }
    }

    fn is_stale(&self, now: Instant) -> bool {
        self.confirmed_at.load(Ordering::Relaxed) == u64::MAX || self.age(now) > STALE_AFTER
    }

    /// Revision up to which all revocations are known; `None` if none are.
    #[must_use]
    pub fn revision(&self) -> Option<Generation> {
        let revoked = self.revoked();
        (revoked.floor() != Generation::MAX).then(|| revoked.known())
    }

    /// Number of devices whose earlier tokens are invalid.
    #[must_use]
    pub fn revoked_len(&self) -> usize {
        self.revoked().devices().len()
    }

    fn revoked(&self) -> std::sync::RwLockReadGuard<'_, Revoked> {
        self.revoked.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Revoked) -> T) -> T {
        change(&mut self.revoked.write().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn revalidations(&self) -> MutexGuard<'_, Revalidations<Case>> {
        self.revalidations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
