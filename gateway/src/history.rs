//! What this node remembers of a device after its socket is gone: its last attempts, and when and why it went offline.
//!
//! Bounded in devices by two generations: the older is dropped whole when the younger is full. Devices that have been authenticated
//! have generations of their own, so that a flood of made-up ids can't push them out. It lies in shards with a lock each, so that
//! whoever walks all of it holds up a connecting device for no longer than a shard takes.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use seawall_proto::{
    id::DeviceId,
    time::{Instant, WallTime},
};

use crate::cohorts::{Cohort, Outcome};

/// Attempts kept for each device (contract section 6).
pub const ATTEMPTS_MAX: usize = 20;
/// Devices in one generation of those that have been authenticated; at most two generations are kept.
const KNOWN_MAX: usize = 250_000;
/// The same for ids that have not.
const STRANGERS_MAX: usize = 5_000;
/// A session that begins within this time of the end of the device's last one is a repeat: 10 min, as in overload.md section 5.
pub const REPEAT_WITHIN: Duration = Duration::from_secs(600);
/// Shards: a power of two. With 500,000 devices remembered a shard has 8,000, and a walk through it takes well under 1 ms.
const SHARDS: usize = 64;

/// One connect attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    pub at: WallTime,
    pub outcome: Outcome,
}

/// The end of a device's last session here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offline {
    /// For people. Spans are reckoned from [`at`](Self::at): the wall clock may be set.
    pub since: WallTime,
    pub at: Instant,
    /// A label of `seawall_closes_total`.
    pub reason: &'static str,
}

/// What a device was when it had a session here last.
#[derive(Debug, Clone)]
pub struct Identity {
    pub cohort: Arc<Cohort>,
    pub tenant: Arc<str>,
}

/// What is remembered of one device.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Oldest first.
    pub attempts: Vec<Attempt>,
    pub offline: Option<Offline>,
    /// Of its last session; `None` where it had none.
    pub identity: Option<Identity>,
}

/// The same in a form that is small for the many: they are online, and came once.
#[derive(Debug, Default)]
struct Kept {
    /// Oldest first.
    attempts: Box<[PackedAttempt]>,
    offline: Option<Box<Offline>>,
    /// Of its last session; `None` where it had none.
    identity: Option<Identity>,
}

/// An attempt in eight bytes: its time, and the index of its outcome in the lowest byte.
#[derive(Debug, Clone, Copy)]
struct PackedAttempt(u64);

const OUTCOME_BITS: u32 = u8::BITS;

impl From<Attempt> for PackedAttempt {
    fn from(attempt: Attempt) -> Self {
        Self(attempt.at.as_unix_ms() << OUTCOME_BITS | attempt.outcome.index() as u64)
    }
}

impl From<PackedAttempt> for Attempt {
    fn from(PackedAttempt(packed): PackedAttempt) -> Self {
        let [outcome, ..] = packed.to_le_bytes();
        Self {
            at: WallTime::from_unix_ms(packed >> OUTCOME_BITS),
            outcome: Outcome::of_index(outcome.into()),
        }
    }
}

/// All that is remembered.
#[derive(Debug)]
pub struct History {
    shards: Box<[Mutex<Shard>]>,
}

#[derive(Debug)]
struct Shard {
    known: Generations,
    strangers: Generations,
}

#[derive(Debug)]
struct Generations {
    /// Trees, which are never half empty: a hash map is, whenever it has just grown.
    young: BTreeMap<DeviceId, Kept>,
    old: BTreeMap<DeviceId, Kept>,
    len_max: usize,
}

impl Default for History {
    fn default() -> Self {
        let shard = || Shard {
            known: Generations::new(KNOWN_MAX / SHARDS),
            strangers: Generations::new(STRANGERS_MAX / SHARDS),
        };
        Self {
            shards: (0..SHARDS).map(|_| Mutex::new(shard())).collect(),
        }
    }
}

impl History {
    /// A device was admitted: from now on it is known.
    pub fn admitted(&self, device: DeviceId, at: WallTime) {
        let mut shard = self.shard(device);
        let before = shard.strangers.remove(device);
        let record = shard.known.entry(device);
        if let Some(before) = before {
            record.attempts = before.attempts;
        }
        record.push(Attempt {
            at,
            outcome: Outcome::Admitted,
        });
    }

    /// A device was refused, or left before its answer. The cohort of its last session here, where it had one.
    pub fn refused(&self, device: DeviceId, at: WallTime, outcome: Outcome) -> Option<Arc<Cohort>> {
        let mut shard = self.shard(device);
        let generations = if shard.known.contains(device) {
            &mut shard.known
        } else {
            &mut shard.strangers
        };
        let record = generations.entry(device);
        record.push(Attempt { at, outcome });
        let identity = record.identity.as_ref();
        identity.map(|identity| Arc::clone(&identity.cohort))
    }

    /// A device has a session. True if it had another one until a short time ago: see [`REPEAT_WITHIN`].
    pub fn came_online(&self, device: DeviceId, identity: Identity, at: Instant) -> bool {
        let mut shard = self.shard(device);
        let record = shard.known.entry(device);
        let had_session = record.identity.replace(identity).is_some();
        let left = record.offline.take();
        had_session && left.is_none_or(|left| at.saturating_since(left.at) < REPEAT_WITHIN)
    }

    /// Shows every remembered device that had a session, shard by shard, in no order. Nothing else is remembered in that shard
    /// meanwhile: `each` must be quick. Takes some 20 ms for all that fits: not for an async task.
    pub fn for_each_known(&self, mut each: impl FnMut(DeviceId, &Identity)) {
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (device, record) in shard.known.young.iter().chain(&shard.known.old) {
                if let Some(identity) = &record.identity {
                    each(*device, identity);
                }
            }
        }
    }

    /// A device's newest session ended.
    pub fn went_offline(&self, device: DeviceId, (at, since): (Instant, WallTime), reason: &'static str) {
        let mut shard = self.shard(device);
        shard.known.entry(device).offline = Some(Box::new(Offline { since, at, reason }));
    }

    #[must_use]
    pub fn record(&self, device: DeviceId) -> Option<Record> {
        let shard = self.shard(device);
        let kept = shard.known.get(device).or_else(|| shard.strangers.get(device))?;
        Some(kept.record())
    }

    /// Devices that have been authenticated here and are remembered.
    #[must_use]
    pub fn known_len(&self) -> usize {
        let len = |shard: &Mutex<Shard>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.known.young.len() + shard.known.old.len()
        };
        self.shards.iter().map(len).sum()
    }

    /// Forgets a device that was deleted from the registry.
    pub fn forget(&self, device: DeviceId) {
        let mut shard = self.shard(device);
        shard.known.remove(device);
        shard.strangers.remove(device);
    }

    fn shard(&self, device: DeviceId) -> MutexGuard<'_, Shard> {
        let bytes = device.as_bytes();
        let index = usize::from(bytes[15] ^ bytes[7] ^ bytes[3]) % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn push(&mut self, attempt: Attempt) {
        let surplus = (self.attempts.len() + 1).saturating_sub(ATTEMPTS_MAX);
        let kept = self.attempts[surplus..].iter().copied();
        self.attempts = kept.chain([attempt.into()]).collect();
    }

    fn record(&self) -> Record {
        Record {
            attempts: self.attempts.iter().copied().map(Attempt::from).collect(),
            offline: self.offline.as_deref().copied(),
            identity: self.identity.clone(),
        }
    }
}

impl Generations {
    fn new(len_max: usize) -> Self {
        Self {
            young: BTreeMap::new(),
            old: BTreeMap::new(),
            len_max,
        }
    }

    fn contains(&self, device: DeviceId) -> bool {
        self.young.contains_key(&device) || self.old.contains_key(&device)
    }

    fn get(&self, device: DeviceId) -> Option<&Kept> {
        self.young.get(&device).or_else(|| self.old.get(&device))
    }

    fn remove(&mut self, device: DeviceId) -> Option<Kept> {
        self.young.remove(&device).or_else(|| self.old.remove(&device))
    }

    /// The record of a device, in the young generation.
    fn entry(&mut self, device: DeviceId) -> &mut Kept {
        if !self.young.contains_key(&device) && self.young.len() >= self.len_max {
            self.old = std::mem::take(&mut self.young);
        }
        let old = &mut self.old;
        self.young
            .entry(device)
            .or_insert_with(|| old.remove(&device).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
        time::Duration,
    };

    use seawall_proto::refusal::Code;

    use super::*;
    use crate::cohorts::Cohorts;

    #[test]
    fn keeps_the_last_twenty_attempts() {
        let history = History::default();

        for n in 0..30 {
            history.refused(device(1), WallTime::from_unix_ms(n), Outcome::Refused(Code::Overloaded));
        }
        history.admitted(device(1), WallTime::from_unix_ms(30));

        let attempts = history.record(device(1)).unwrap().attempts;
        assert_eq!(attempts.len(), ATTEMPTS_MAX);
        assert_eq!(attempts[0].at, WallTime::from_unix_ms(11));
        assert_eq!(attempts[19].outcome, Outcome::Admitted);
    }

    #[test]
    fn a_device_that_is_online_takes_little() {
        assert!(size_of::<(DeviceId, Kept)>() <= 64);
    }

    #[test]
    fn attempts_are_packed_and_come_out_as_they_were() {
        let refused = Code::ALL.iter().map(|code| Outcome::Refused(*code));
        for outcome in [Outcome::Admitted, Outcome::Abandoned].into_iter().chain(refused) {
            let at = WallTime::from_unix_ms(1_790_000_000_123);
            let attempt = Attempt { at, outcome };

            assert_eq!(Attempt::from(PackedAttempt::from(attempt)), attempt);
        }
    }

    #[test]
    fn made_up_ids_neither_grow_it_nor_push_out_real_devices() {
        let history = History::default();
        history.admitted(device(1), WallTime::from_unix_ms(1));

        for n in 0..50_000 {
            history.refused(
                device(1_000 + n),
                WallTime::from_unix_ms(2),
                Outcome::Refused(Code::Unauthorized),
            );
        }

        let len = |shard: &Mutex<Shard>| {
            let shard = shard.lock().unwrap();
            shard.strangers.young.len() + shard.strangers.old.len()
        };
        let strangers: usize = history.shards.iter().map(len).sum();
        assert!(strangers <= 2 * STRANGERS_MAX, "{strangers}");
        assert_eq!(history.record(device(1)).unwrap().attempts.len(), 1);
    }

    #[test]
    fn walking_all_of_it_holds_nobody_up_for_long() {
        let history = History::default();
        let cohort = Cohorts::new().intern(None, Some("1.0"));
        for n in 0..200_000 {
            let identity = Identity {
                cohort: Arc::clone(&cohort),
                tenant: "default".into(),
            };
            history.came_online(spread(n), identity, Instant::ZERO);
        }
        let (mut seen, begun) = (0, std::time::Instant::now());
        history.for_each_known(|_, _| seen += 1);
        let walk = begun.elapsed();

        // Devices come while somebody walks through all of it, again and again.
        let is_over = AtomicBool::new(false);
        let mut waits: Vec<Duration> = thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    history.for_each_known(|_, identity| drop(Arc::clone(&identity.tenant)));
                }
            });
            let waits = (0..20_000).map(|n| {
                let begun = std::time::Instant::now();
                history.admitted(spread(n), WallTime::from_unix_ms(1));
                begun.elapsed()
            });
            let waits = waits.collect();
            is_over.store(true, Ordering::Relaxed);
            waits
        });

        waits.sort_unstable();
        let (most, longest) = (waits[waits.len() * 95 / 100], waits[waits.len() - 1]);
        println!("a walk takes {walk:?}; 95 % of devices waited at most {most:?}, the last one {longest:?}");
        assert_eq!((seen, history.known_len()), (200_000, 200_000));
        // Under one lock half of them wait for half a walk and more.
        assert!(most < walk / 8, "{most:?} of {walk:?}");
    }

    #[test]
    fn session_soon_after_another_of_the_device_is_a_repeat() {
        let history = History::default();
        let cohort = Cohorts::new().intern(None, Some("1.0"));
        let at = |ms: u64| Instant::from_micros(ms * 1_000);
        // The wall clock is set back by an hour, and then forward by a day: it makes no difference.
        let went_offline = |ms, wall_ms| {
            history.went_offline(device(1), (at(ms), WallTime::from_unix_ms(wall_ms)), "client_gone");
        };
        let online = |ms| {
            let identity = Identity {
                cohort: Arc::clone(&cohort),
                tenant: "default".into(),
            };
            history.came_online(device(1), identity, at(ms))
        };

        assert!(!online(0), "the first");
        assert!(online(1), "it replaced one");
        went_offline(1_000, 90_000_000);
        assert!(online(600_000));
        went_offline(600_000, 86_400_000_000);
        assert!(!online(1_200_000), "ten minutes later");
    }

    /// Ids whose bytes spread as those of random ids do.
    fn spread(n: u128) -> DeviceId {
        device(n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
    }

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }
}
