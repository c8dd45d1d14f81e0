use std::{
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant as Clock},
};

use seawall_proto::refusal::Code;

use super::{groups::By, queue::Entry, *};
use crate::fleet::cohorts::Cohorts;

const RESET: Presence = Presence::Offline(Evidence::Reset);

/// A table with devices of one kind.
struct Rig {
    history: History,
    cohort: Arc<Cohort>,
    tenant: Arc<str>,
}

impl Rig {
    fn new() -> Self {
        Self::with_bounds(KNOWN_MAX, QUEUE_LEN_MAX)
    }

    fn with_bounds(known_max: usize, queue_len_max: usize) -> Self {
        Self {
            history: History::with_bounds(known_max, queue_len_max),
            cohort: Cohorts::new().intern(Some("m"), Some("1.0")),
            tenant: "default".into(),
        }
    }

    fn online(&self, device: DeviceId, epoch: u64, ms: u64) -> Option<u8> {
        let began = Began {
            epoch: SessionId(epoch),
            cohort: &self.cohort,
            tenant: &self.tenant,
            since: WallTime::from_unix_ms(ms),
            at: Instant::from_micros(ms * 1_000),
        };
        self.history.came_online(device, began).returned
    }

    fn offline(&self, device: DeviceId, epoch: u64, ms: u64, repeats: u8) -> bool {
        let offline = Offline {
            since: WallTime::from_unix_ms(ms),
            at: Instant::from_micros(ms * 1_000),
            reason: EndReason::ClientGone,
            evidence: Evidence::Reset,
            repeats,
        };
        self.history.went_offline(device, SessionId(epoch), offline).is_some()
    }

    fn presence(&self, device: DeviceId) -> Presence {
        self.history.record(device).unwrap().known.presence
    }

    /// What waits for the database: number of the device, epoch, state.
    fn queued(&self) -> Vec<(u128, u64, PresenceState)> {
        let entries = self.history.queue().oldest(1_000).into_iter();
        let transitions = entries.filter_map(|entry| match entry {
            Entry::Transition(transition) => Some(transition),
            Entry::Forget(_) => None,
        });
        transitions
            .map(|transition| {
                let known = transition.known;
                (
                    transition.device.as_uuid().as_u128(),
                    known.epoch.0,
                    PresenceState::of(known.presence),
                )
            })
            .collect()
    }
}

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
fn made_up_ids_neither_grow_it_nor_push_out_real_devices() {
    let history = History::default();
    history.admitted(device(1), WallTime::from_unix_ms(1));

    for n in 0..50_000 {
        let code = Outcome::Refused(Code::Unauthorized);
        history.refused(device(1_000 + n), WallTime::from_unix_ms(2), code);
    }

    let len = |shard: &Mutex<UnknownIds>| {
        let shard = shard.lock().unwrap();
        shard.young.len() + shard.old.len()
    };
    let unknown: usize = history.unknown_ids.iter().map(len).sum();
    assert!(unknown <= 2 * STRANGERS_MAX, "{unknown}");
    assert_eq!(history.record(device(1)).unwrap().attempts.len(), 1);
    assert_eq!(history.known_len(), 1);
}

#[test]
fn device_that_was_held_was_not_online_when_it_returns_in_a_new_session() {
    let rig = Rig::new();
    let began = |epoch| Began {
        epoch: SessionId(epoch),
        cohort: &rig.cohort,
        tenant: &rig.tenant,
        since: WallTime::from_unix_ms(epoch),
        at: Instant::ZERO,
    };
    let held = Known {
        epoch: SessionId(1),
        presence: Presence::Unknown(Cause::Path),
        since: WallTime::from_unix_ms(5),
    };

    assert!(!rig.history.came_online(device(1), began(1)).was_online);
    assert!(rig.history.handle(device(1), held, Cause::Path.into()).is_some());
    let returned = rig.history.came_online(device(1), began(2));

    assert!(!returned.was_online && returned.returned == Some(0), "{returned:?}");
    assert!(rig.history.came_online(device(1), began(3)).was_online);
}

#[test]
fn session_soon_after_another_of_the_device_is_a_return() {
    let rig = Rig::new();

    assert_eq!(rig.online(device(1), 1, 0), None, "the first");
    assert_eq!(rig.online(device(1), 2, 1), Some(0), "it replaced one");
    rig.offline(device(1), 2, 1_000, 2);
    assert_eq!(rig.online(device(1), 3, 600_000), Some(2));
    rig.offline(device(1), 3, 600_000, 3);
    assert_eq!(rig.online(device(1), 4, 1_200_000), None, "ten minutes later");
}

#[test]
fn late_close_changes_neither_state_nor_counts_nor_the_queue() {
    let rig = Rig::new();
    rig.online(device(1), 1, 1);
    rig.online(device(1), 2, 2);

    assert!(!rig.offline(device(1), 1, 3, 0));

    assert_eq!(rig.presence(device(1)), Presence::Online);
    assert_eq!(rig.history.groups().total().online, 1);
    let online = PresenceState::Online;
    assert_eq!(rig.queued(), [(1, 1, online), (1, 2, online)]);
    assert!(rig.offline(device(1), 2, 4, 0));
    assert_eq!(rig.history.groups().by(By::Tenant)[&Some("default".into())].offline, 1);
}

#[test]
fn counts_follow_a_device_to_its_new_version() {
    let rig = Rig::new();
    rig.online(device(1), 1, 1);
    rig.offline(device(1), 1, 2, 0);
    let newer = Cohorts::new().intern(Some("m"), Some("2.0"));
    let began = Began {
        epoch: SessionId(2),
        cohort: &newer,
        tenant: &rig.tenant,
        since: WallTime::from_unix_ms(3),
        at: Instant::ZERO,
    };

    rig.history.came_online(device(1), began);

    let by = rig.history.groups().by(By::Firmware);
    assert_eq!(by.keys().flatten().map(|key| &**key).collect::<Vec<_>>(), ["2.0"]);
    assert_eq!(rig.history.groups().total().total(), 1);
    rig.history.forget(device(1));
    assert_eq!(rig.history.groups().total().total(), 0);
}

#[test]
fn full_table_forgets_who_was_offline_for_longest_and_nobody_who_is_online() {
    let rig = Rig::with_bounds(4 * SHARDS, QUEUE_LEN_MAX);
    let of_one_shard: Vec<DeviceId> = (0..)
        .map(spread)
        .filter(|id| hash(*id) >> (u64::BITS - SHARD_BITS) == 5)
        .take(7)
        .collect();
    for (number, id) in (0..).zip(&of_one_shard[..4]) {
        rig.online(*id, 10 + number, number);
    }
    rig.offline(of_one_shard[2], 12, 50, 0);
    rig.offline(of_one_shard[1], 11, 60, 0);

    for id in &of_one_shard[4..] {
        rig.online(*id, 99, 99);
    }

    let is_known = |index: usize| rig.history.record(of_one_shard[index]).is_some();
    assert_eq!(
        [0, 1, 2, 3, 4, 5, 6].map(is_known),
        [true, false, false, true, true, true, true]
    );
    assert_eq!((rig.history.known_len(), rig.history.groups().total().online), (5, 5));
}

#[test]
fn full_queue_drops_transitions_counts_them_and_keeps_the_newest_state() {
    let rig = Rig::with_bounds(KNOWN_MAX, 3);
    let (online, offline) = (PresenceState::Online, PresenceState::Offline);
    for n in 1..=5 {
        rig.online(device(n), 1, 1);
    }
    rig.offline(device(4), 1, 2, 0);
    assert_eq!(rig.queued(), [(1, 1, online), (2, 1, online), (3, 1, online)]);
    assert_eq!(
        (rig.history.queue().dropped(), rig.history.queue().is_behind()),
        (3, true)
    );

    rig.history.catch_up();
    assert!(rig.history.queue().is_behind(), "there is no room");
    rig.history.queue().remove(3);
    rig.history.catch_up();

    let mut queued = rig.queued();
    queued.sort_by_key(|(device, ..)| *device);
    assert_eq!(queued, [(4, 1, offline), (5, 1, online)]);
    assert!(!rig.history.queue().is_behind());
    rig.history.queue().remove(2);
    rig.history.catch_up();
    assert!(rig.queued().is_empty(), "each is queued once");
}

#[test]
fn what_the_database_had_is_unknown_after_a_restart_and_yields_to_what_is_newer() {
    let rig = Rig::new();
    let stored = |number, epoch, presence| Stored {
        device: device(number),
        known: Known {
            epoch: SessionId(epoch),
            presence,
            since: WallTime::from_unix_ms(5),
        },
        reason: Reason::CONNECTED,
        cohort: &rig.cohort,
        tenant: &rig.tenant,
    };
    let restarted = Some((Cause::NodeRestarted, WallTime::from_unix_ms(9)));
    rig.online(device(3), 7, 8);
    rig.history.queue().remove(1);

    assert!(rig.history.restore(stored(1, 1, Presence::Online), restarted));
    assert!(!rig.history.restore(stored(2, 1, RESET), restarted));
    assert!(!rig.history.restore(stored(3, 1, Presence::Online), restarted));

    assert_eq!(rig.presence(device(1)), Presence::Unknown(Cause::NodeRestarted));
    assert_eq!(
        (rig.presence(device(2)), rig.presence(device(3))),
        (RESET, Presence::Online)
    );
    assert_eq!(rig.queued(), [(1, 1, PresenceState::Unknown)], "only what is news");
    assert_eq!(
        rig.online(device(1), 8, 10),
        None,
        "a restart is not a fault of the device"
    );
    assert!(
        rig.history
            .give_up(device(1), WallTime::from_unix_ms(400_000))
            .is_none()
    );
    assert!(rig.history.restore(stored(4, 1, Presence::Online), restarted));
    let record = rig.history.give_up(device(4), WallTime::from_unix_ms(400_000)).unwrap();
    let evidence = Evidence::NotBack {
        since: WallTime::from_unix_ms(9),
    };
    assert_eq!(record.known.presence, Presence::Offline(evidence));
    assert_eq!(record.reason.as_str(), "not_back");
}

#[test]
fn pages_are_complete_and_in_the_order_of_ids() {
    let rig = Rig::new();
    for n in 0..5_000 {
        rig.online(spread(n), 1, 1);
        if n % 3 == 0 {
            rig.offline(spread(n), 1, 2, 0);
        }
    }
    let mut expected: Vec<DeviceId> = (0..5_000).filter(|n| n % 3 == 0).map(spread).collect();
    expected.sort_unstable();

    let (mut seen, mut first) = (Vec::new(), None);
    loop {
        let mut page = rig.history.page(first, 101, Some(PresenceState::Offline), |_| true);
        first = (page.len() == 101).then(|| page.pop()).flatten();
        seen.extend(page);
        if first.is_none() {
            break;
        }
    }

    assert_eq!(seen, expected);
    assert!(
        rig.history
            .page(None, 10, None, |group| group.cohort.firmware.is_none())
            .is_empty()
    );
}

/// A million devices: what each takes, and how long a page and counts take. Times are of an optimized build.
#[test]
#[cfg_attr(debug_assertions, ignore = "measures an optimized build")]
fn million_devices_are_paged_and_counted_in_time_measured() {
    const DEVICES: u128 = 1_000_000;
    let rig = Rig::new();
    let cohorts = Cohorts::new();
    let versions: Vec<_> = (0..50)
        .map(|n| cohorts.intern(Some("m"), Some(&format!("3.{n}.0"))))
        .collect();
    let tenants: Vec<Arc<str>> = (0..100).map(|n| format!("tenant-{n}").into()).collect();
    for n in 0..DEVICES {
        let index = usize::try_from(n).unwrap();
        let began = Began {
            epoch: SessionId(1),
            cohort: &versions[index % versions.len()],
            tenant: &tenants[index / 7 % tenants.len()],
            since: WallTime::from_unix_ms(1),
            at: Instant::ZERO,
        };
        rig.history.admitted(spread(n), WallTime::from_unix_ms(1));
        rig.history.came_online(spread(n), began);
        if n % 10 == 0 {
            rig.offline(spread(n), 1, 2, 0);
        }
    }
    assert_eq!(rig.history.known_len(), 1_000_000);
    let capacity: usize = rig
        .history
        .shards
        .iter()
        .map(|shard| shard.lock().unwrap().capacity())
        .sum();
    let bytes = capacity * size_of::<Kept>() / 1_000_000;

    let timed = |work: &dyn Fn() -> usize| {
        let took = (0..5).map(|_| {
            let begun = Clock::now();
            let found = work();
            (begun.elapsed(), found)
        });
        took.min().unwrap()
    };
    let offline = Some(PresenceState::Offline);
    let page = timed(&|| {
        rig.history
            .page(None, 101, offline, |group| &*group.tenant == "tenant-7")
            .len()
    });
    let last = timed(&|| rig.history.page(Some(spread(77)), 101, offline, |_| true).len());
    let none = timed(&|| {
        rig.history
            .page(None, 101, Some(PresenceState::Unknown), |_| true)
            .len()
    });
    let counts = timed(&|| rig.history.groups().by(By::Tenant).len());
    println!("{bytes} bytes per device; a page takes {page:?}, {last:?}, an empty one {none:?}, counts {counts:?}");

    assert!(bytes <= 72, "{bytes} bytes per device");
    assert_eq!((page.1, last.1, none.1, counts.1), (101, 101, 0, 100));
    for (took, _) in [page, last, none] {
        assert!(took <= Duration::from_millis(50), "{took:?}");
    }
    assert!(counts.0 <= Duration::from_millis(5), "{counts:?}");
}

#[test]
fn walking_all_of_it_holds_nobody_up_for_long() {
    let rig = Rig::new();
    for n in 0..200_000 {
        rig.online(spread(n), 1, 1);
    }
    // Nobody is so: each walk goes through all.
    let walk = || rig.history.page(None, 10, Some(PresenceState::Unknown), |_| true).len();
    let begun = Clock::now();
    assert_eq!(walk(), 0);
    let took = begun.elapsed();

    // Devices come while somebody walks through all of it, again and again.
    let is_over = AtomicBool::new(false);
    let mut waits: Vec<Duration> = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                walk();
            }
        });
        let waits = (0..20_000).map(|n| {
            let begun = Clock::now();
            rig.history.admitted(spread(n), WallTime::from_unix_ms(1));
            begun.elapsed()
        });
        let waits = waits.collect();
        is_over.store(true, Ordering::Relaxed);
        waits
    });

    waits.sort_unstable();
    let (most, longest) = (waits[waits.len() * 95 / 100], waits[waits.len() - 1]);
    println!("a walk takes {took:?}; 95 % of devices waited at most {most:?}, the last one {longest:?}");
    // Under one lock half of them wait for half a walk and more.
    assert!(most < took / 8, "{most:?} of {took:?}");
}

/// Ids whose bytes spread as those of random ids do.
fn spread(n: u128) -> DeviceId {
    device(n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

fn device(n: u128) -> DeviceId {
    DeviceId::from_uuid(uuid::Uuid::from_u128(n))
}
