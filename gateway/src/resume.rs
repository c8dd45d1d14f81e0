//! Resume tokens on this node: minted for sessions, weighed when a device comes back, and revoked.
//!
//! A revocation made through this node counts before its caller is answered; one made elsewhere is seen by polling the revision.
//! What is known is also on disk, so that a start without a database refuses those who were revoked. Where nothing is known, no
//! token counts. `seawall_proto::resume` decides; the statements are in [`crate::store`].

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use seawall_proto::{
    handshake::{self, Resumption, Screened},
    hello::Hello,
    id::{DeviceId, SessionId},
    resume::{Drills, Generation, Grant, Judge, Minted, Offered, REVOKED_MAX, ResumeKeys, Revoked, STALE_AFTER},
    rules::RuleSet,
    time::Instant,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    state::Shared,
    store::{Store, StoreError, StoredRevocations},
};

mod drill;
mod journal;
mod unwanted;

use self::journal::{Journal, Line};

pub use drill::drill;
pub use unwanted::{HANDSHAKE_MAX, end_unwanted_session};

/// How often the revision of the revocations is read: a revocation counts on every node within a second.
const POLL_INTERVAL: Duration = Duration::from_millis(400);
/// How long after a change made here it is read. Until then the devices changed get no new token.
const NEWS_PAUSE: Duration = Duration::from_millis(50);
/// Most changed devices whose sessions are still to be looked at. Beyond it the oldest are not: their sessions stay.
const CHANGED_MAX: usize = 2 * REVOKED_MAX;
/// Polls between two prunings of the revocations in the database: an hour.
const POLLS_TO_PRUNE: u32 = 9_000;

/// The resume tokens of this node.
pub struct Resume {
    keys: ResumeKeys,
    /// Zero: there are none.
    life: Duration,
    revoked: RwLock<Revoked>,
    /// When the database last confirmed them, in microseconds of the process clock; `u64::MAX` before the first time.
    confirmed_at: AtomicU64,
    /// Who reads the database.
    loading: tokio::sync::Mutex<()>,
    journal: Journal,
    /// The database is to be read at once.
    news: Notify,
    /// Changed devices, each with the time from which its session is to be looked at.
    changed: Mutex<VecDeque<(Instant, DeviceId)>>,
    drills: Mutex<Drills<Case>>,
    drawn: Notify,
}

/// One who came back by token, to be looked up.
struct Case {
    grant: Grant,
    session: SessionId,
}

impl Resume {
    /// Starts from the revocations on disk. Without them no token counts until the database was asked.
    #[must_use]
    pub fn open(data_dir: &Path, keys: ResumeKeys, life: Duration) -> Self {
        let journal = Journal::new(data_dir);
        let revoked = match journal.read() {
            Ok(kept) => kept,
            Err(error) => {
                tracing::error!(%error, file = %journal.path().display(), "ignoring unreadable file of revocations: no resume token counts until the database answers");
                None
            }
        };
        Self {
            keys,
            life,
            revoked: RwLock::new(revoked.unwrap_or_else(Revoked::unknown)),
            confirmed_at: AtomicU64::new(u64::MAX),
            loading: tokio::sync::Mutex::default(),
            journal,
            news: Notify::new(),
            changed: Mutex::default(),
            drills: Mutex::default(),
            drawn: Notify::new(),
        }
    }

    /// Weighs the token that a device shows, if it shows one.
    pub fn weigh(&self, screened: Screened, rules: &RuleSet, clock: &Clock) -> Resumption {
        self.judged(clock, |judge| {
            handshake::resume(screened, judge, rules, clock.wall(), &mut rand::rng())
        })
    }

    /// Whether a device shows a token that counts, beside its credential.
    #[must_use]
    pub fn is_shown_by(&self, hello: &Hello, clock: &Clock) -> bool {
        let (Some(token), Some(credential)) = (&hello.resume, &hello.credential) else {
            return false;
        };
        self.judged(clock, |judge| {
            judge.weigh(hello.device, credential, token, clock.wall()).is_ok()
        })
    }

    fn judged<T>(&self, clock: &Clock, weigh: impl FnOnce(&Judge<'_>) -> T) -> T {
        let revoked = self.revoked();
        let nothing = Revoked::unknown();
        let judge = Judge {
            keys: &self.keys,
            revoked: if self.life.is_zero() { &nothing } else { &revoked },
            is_stale: self.is_stale(clock.now()),
        };
        weigh(&judge)
    }

    /// All revocations up to here are known. To be asked before a look-up is sent.
    #[must_use]
    pub fn known(&self) -> Generation {
        self.revoked().known()
    }

    /// A token for a device's session; `None` where tokens are off, or the device was changed since it was authenticated.
    pub fn mint(&self, grant: &mut Grant, session: SessionId, clock: &Clock) -> Option<Minted> {
        if self.life.is_zero() || !grant.refresh(&self.revoked()) {
            return None;
        }
        grant.mint(&self.keys, session, self.life, clock.wall())
    }

    /// No revocation concerns the device since it was granted this.
    fn allows(&self, grant: &Grant) -> bool {
        self.revoked().allows(grant.device, grant.generation)
    }

    /// Draws whether one who came back by token is looked up. False where too many wait for that.
    pub fn offer_drill(&self, grant: &Grant, session: SessionId) -> bool {
        let case = || Case {
            grant: grant.clone(),
            session,
        };
        match self.drills().offer(case, &mut rand::rng()) {
            Offered::NotDrawn => true,
            Offered::Waiting => {
                self.drawn.notify_one();
                true
            }
            Offered::Full => false,
        }
    }

    /// A device was changed in the registry, or may have been: tokens of before no longer count, here and on disk, when this
    /// returns; on other nodes when they have polled.
    pub async fn revoke(&self, device: DeviceId) {
        let at = self.change(|revoked| revoked.revoke_now(device));
        self.journal.queue([Line::revoked(device, at)]);
        self.persist().await;
        // Until its revision is known, no token of the device is made.
        self.news.notify_one();
    }

    /// Looks whether the database holds other revocations, and takes them.
    ///
    /// # Errors
    /// The database can't be read; what is known stays.
    pub async fn poll(&self, store: &Store, clock: &Clock) -> Result<(), StoreError> {
        let _one_at_a_time = self.loading.lock().await;
        let (known, floor) = (self.revision(), self.revoked().floor());
        let mut stored = store.revocations_since(known).await?;
        if let Some(known) = known.filter(|known| *known > stored.revision) {
            tracing::warn!(
                revision = stored.revision.0,
                known = known.0,
                "the registry is older than what this node has seen of it: resume tokens of before no longer count"
            );
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

    /// Sessions of these devices are to be looked at, from `due` on.
    fn note_changed(&self, devices: impl IntoIterator<Item = DeviceId>, due: Instant) {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        changed.extend(devices.into_iter().map(|device| (due, device)));
        let surplus = changed.len().saturating_sub(CHANGED_MAX);
        changed.drain(..surplus);
    }

    /// Up to `most` of those whose time has come and who are `wanted`; the others whose time has come are forgotten.
    fn take_changed(&self, now: Instant, most: usize, wanted: impl Fn(DeviceId) -> bool) -> Vec<DeviceId> {
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

    async fn persist(&self) {
        self.journal.persist(|| journal::whole(&self.revoked())).await;
    }

    /// Time since the database last confirmed the revocations; since the start where it never did.
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

    /// All revocations up to here are known; `None` where nothing is.
    #[must_use]
    pub fn revision(&self) -> Option<Generation> {
        let revoked = self.revoked();
        (revoked.floor() != Generation::MAX).then(|| revoked.known())
    }

    /// Devices whose older tokens don't count.
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

    fn drills(&self) -> MutexGuard<'_, Drills<Case>> {
        self.drills.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Polls the revocations until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    let mut polls = 0_u32;
    loop {
        let mut outcome = state.resume.poll(&state.store, &state.clock).await;
        if outcome.is_ok() {
            outcome = unwanted::end_unwanted_sessions(&state).await;
        }
        if outcome.is_ok() && polls.is_multiple_of(POLLS_TO_PRUNE) {
            outcome = state.store.revocations_prune(state.clock.wall()).await;
        }
        polls = polls.wrapping_add(1);
        match (&outcome, is_failing) {
            (Err(error), false) => tracing::warn!(%error, "revocations can't be read: those known stay"),
            (Ok(()), true) => tracing::info!("revocations can be read again"),
            (Ok(()), false) | (Err(_), true) => {}
        }
        is_failing = outcome.is_err();
        tokio::select! {
            () = stop.cancelled() => return,
            // Many that come together are read together.
            () = state.resume.news.notified() => tokio::time::sleep(NEWS_PAUSE).await,
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }
}
